/* What the report's page does: a map, lists of rows, charts. All words from data enter by textContent, never as markup. */
"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);
const points = JSON.parse(document.getElementById("points-data").textContent);
const byId = (id) => document.getElementById(id);
const PALETTE = ["#4c78a8", "#f58518", "#3f9a57", "#e45756", "#8e6bbf", "#9d6b4f", "#e377c2", "#17a2b8", "#b5a21c", "#6f7fe0", "#a83a6b", "#5aae9c"];
const REST = "#9aa0a6";

// ---------------------------------------------------------------- small things

function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.base64), (c) => c.charCodeAt(0));
  const kinds = { float32: Float32Array, int32: Int32Array, int16: Int16Array, int8: Int8Array };
  return new kinds[packed.dtype](bytes.buffer);
}

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(digits);
}

const percent = (value) => (value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)} %`);
const at = new Map(points.rows.map((row, i) => [row, i]));
const thumbNumber = unpack(points.thumbs.number);
const sheetUrls = new Map();

function sheetUrl(number) {
  if (!sheetUrls.has(number)) {
    const bytes = Uint8Array.from(atob(byId(`sheet-${number}`).textContent), (c) => c.charCodeAt(0));
    sheetUrls.set(number, URL.createObjectURL(new Blob([bytes], { type: "image/webp" })));
  }
  return sheetUrls.get(number);
}

function dress(node, i, size) {
  const number = i === undefined ? -1 : thumbNumber[i];
  node.style.width = node.style.height = `${size}px`;
  node.classList.add("thumb");
  if (number < 0) {
    node.classList.add("none");
    node.textContent = points.thumbs.any ? "no picture" : "";
    if (!points.thumbs.any) node.style.display = "none";
    return node;
  }
  const each = points.thumbs.across ** 2;
  const place = number % each;
  const inSheet = Math.min(each, points.thumbs.count - number + place);
  const down = Math.ceil(inSheet / points.thumbs.across);
  node.style.backgroundImage = `url("${sheetUrl(Math.floor(number / each))}")`;
  node.style.backgroundSize = `${points.thumbs.across * size}px ${down * size}px`;
  node.style.backgroundPosition = `-${(place % points.thumbs.across) * size}px -${Math.floor(place / points.thumbs.across) * size}px`;
  return node;
}

const textOf = (i) => (i === undefined ? "" : points.texts[i][0] || points.keys[i]);

function thumb(row, size = 64, shared = false) {
  const i = at.get(row);
  const node = el("button", { type: "button", title: textOf(i), class: shared ? "shared" : undefined, onclick: () => select(i, true) });
  return dress(node, i, size);
}

function item(i, note, size = 56) {
  return el("button", { type: "button", class: "item", onclick: () => select(i, true) }, dress(el("span"), i, size),
    el("span", { class: "text" }, textOf(i), el("br"), el("span", { class: "quiet" }, note)));
}

const rowItem = (row, note, text) => {
  const i = at.get(row);
  const node = item(i, note, 64);
  if (text !== undefined) node.querySelector(".text").firstChild.replaceWith(text);
  return node;
};

// ---------------------------------------------------------------- charts

const drawn = [];
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function theme(layout) {
  const axis = { gridcolor: colourOf("--line"), zerolinecolor: colourOf("--line"), automargin: true };
  const base = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colourOf("--ink"), size: 12 },
    margin: { l: 50, r: 12, t: 30, b: 44 }, hovermode: "closest", showlegend: false };
  const all = { ...base, ...layout };
  for (const name of ["xaxis", "yaxis"]) all[name] = { ...axis, ...(layout[name] || {}) };
  return all;
}

function chart(node, make) {
  const draw = () => {
    const { traces, layout } = make();
    return Plotly.react(node, traces, theme(layout), { displaylogo: false, responsive: true, displayModeBar: false });
  };
  drawn.push(draw);
  draw();
}

// ---------------------------------------------------------------- the map

const columns = points.columns.map((column) => ({ ...column, data: unpack(column.packed) }));
const maps = points.maps.map((map) => ({ ...map, parts: map.parts.map((part) => ({ ...part, data: unpack(part.packed) })) }));
const lists = points.lists.map((list) => ({ ...list, rows: unpack(list.at), cosines: unpack(list.cosine) }));
const haystack = points.keys.map((key, i) => [key, ...points.texts[i], points.labels[i]].join("\n").toLowerCase());
const state = { map: 0, colour: 0, wanted: null, selected: -1 };
const plot = byId("plot");
const scatter = (() => {
  const canvas = document.createElement("canvas");
  return canvas.getContext("webgl2") || canvas.getContext("webgl") ? "scattergl" : "scatter";
})();

function trace(part, chosen, more) {
  const xy = part.data;
  const kept = chosen.filter((i) => !Number.isNaN(xy[2 * i]));
  return { type: scatter, mode: "markers", x: kept.map((i) => xy[2 * i]), y: kept.map((i) => xy[2 * i + 1]), customdata: kept,
    hoverinfo: "none", ...more, marker: { symbol: part.what === "text" ? "diamond" : "circle", size: points.rows.length > 5000 ? 5 : 7, ...more.marker,
      ...(state.wanted && more.hoverinfo !== "skip" ? { size: 11, opacity: 1, line: { width: 1, color: colourOf("--ink") } } : {}) } };
}

function mapTraces() {
  const map = maps[state.map];
  const column = columns[state.colour];
  const all = points.rows.map((_, i) => i);
  const chosen = state.wanted ? all.filter((i) => state.wanted.has(i)) : all;
  const traces = [];
  for (const part of map.parts) {
    if (state.wanted) {
      traces.push(trace(part, all.filter((i) => !state.wanted.has(i)), { hoverinfo: "skip", showlegend: false, marker: { color: colourOf("--faint"), opacity: 0.35 } }));
    }
    if (map.parts.length > 1) {
      traces.push(trace(part, chosen, { name: part.what === "text" ? "texts" : "pictures", marker: { color: part.what === "text" ? PALETTE[1] : PALETTE[0], opacity: 0.75 } }));
    } else if (column.kind === "category") {
      column.values.forEach((name, number) => {
        const mine = chosen.filter((i) => column.data[i] === number);
        const rest = number === column.values.length - 1 && column.rest;
        if (mine.length) traces.push(trace(part, mine, { name: name.length > 28 ? `${name.slice(0, 27)}...` : name, marker: { color: rest ? REST : PALETTE[number % PALETTE.length], opacity: rest ? 0.5 : 0.85 } }));
      });
    } else {
      const known = chosen.filter((i) => !Number.isNaN(column.data[i]));
      const unknown = chosen.filter((i) => Number.isNaN(column.data[i]));
      if (unknown.length) traces.push(trace(part, unknown, { marker: { color: REST, opacity: 0.4 } }));
      traces.push(trace(part, known, { marker: { color: known.map((i) => column.data[i]), colorscale: "Viridis", showscale: true, opacity: 0.85, colorbar: { thickness: 12 } } }));
    }
  }
  for (const one of traces) one.name = (one.name || "").replace(/</g, "&lt;");
  traces.push({ type: "scatter", mode: "markers", x: [], y: [], hoverinfo: "skip", showlegend: false, marker: { size: 14, symbol: "circle-open", color: colourOf("--ink"), line: { width: 2 } } });
  return traces;
}

function ring() {
  const parts = maps[state.map].parts;
  const list = lists[0];
  const shown = state.selected < 0 ? [] : [state.selected, ...(list ? Array.from(list.rows.slice(state.selected * list.k, (state.selected + 1) * list.k)) : [])];
  const kept = shown.filter((i) => i >= 0 && !Number.isNaN(parts[0].data[2 * i]));
  Plotly.restyle(plot, { x: [kept.map((i) => parts[0].data[2 * i])], y: [kept.map((i) => parts[0].data[2 * i + 1])],
    "marker.size": [kept.map((i) => (i === state.selected ? 18 : 10))] }, [plot.data.length - 1]);
}

function drawMap() {
  const map = maps[state.map];
  const column = columns[state.colour];
  const several = map.parts.length > 1 || (column && column.kind === "category");
  byId("map-note").textContent = points.note + (map.parts.length === 1 ? "" : " Diamonds are texts; the distance between the two clouds is the modality gap.");
  const axis = { showticklabels: false, showgrid: false, zeroline: false };
  const layout = { dragmode: "pan", margin: { l: 10, r: 10, t: 10, b: 10 }, xaxis: axis, yaxis: { ...axis, scaleanchor: "x" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colourOf("--quiet"), activecolor: colourOf("--ink") }, showlegend: several, legend: { orientation: "h", y: -0.02, itemsizing: "constant" }, uirevision: `${state.map}` };
  return Plotly.react(plot, mapTraces(), theme(layout), { displaylogo: false, responsive: true, scrollZoom: true,
    modeBarButtonsToRemove: ["toImage", "autoScale2d", "select2d", "lasso2d"] }).then(ring);
}

function hover(event) {
  const box = byId("hover");
  const i = event.points[0].customdata;
  if (i === undefined) return;
  box.replaceChildren(dress(el("div"), i, Math.max(112, 2 * points.thumbs.edge)), ...facts(i));
  box.hidden = false;
  const { clientX: x, clientY: y } = event.event;
  box.style.left = `${Math.max(4, x + 280 > innerWidth ? x - 280 : x + 16)}px`;
  box.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.offsetHeight - 8))}px`;
}

function facts(i) {
  const said = columns.filter((column) => column.kind === "number" && !Number.isNaN(column.data[i])).map((column) => `${column.name} ${figure(column.data[i])}`);
  const groups = columns.filter((column) => column.kind === "category").map((column) => column.values[column.data[i]]).filter(Boolean);
  return [...points.texts[i].map((text) => el("div", null, text)), el("div", { class: "quiet" }, points.keys[i]),
    el("div", { class: "quiet" }, [...new Set([points.labels[i], ...groups])].filter(Boolean).join(" / ")), el("div", { class: "quiet" }, said.join(", "))];
}

function select(i, scroll = false) {
  if (i === undefined || i < 0) return;
  state.selected = i;
  const panel = byId("inspector");
  panel.replaceChildren(dress(el("div"), i, 160), ...facts(i));
  for (const list of lists) {
    const found = [];
    for (let k = 0; k < list.k; k++) {
      const other = list.rows[i * list.k + k];
      if (other >= 0) found.push(item(other, `cosine ${(list.cosines[i * list.k + k] / 127).toFixed(2)}`));
    }
    if (found.length) panel.append(el("h3", null, list.title), ...found);
  }
  panel.scrollTop = 0;
  if (scroll && byId("plot").getBoundingClientRect().bottom < 0) byId("map-section").scrollIntoView({ behavior: "smooth" });
  ring();
}

function search() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length ? haystack.map((text, i) => (words.every((word) => text.includes(word)) ? i : -1)).filter((i) => i >= 0) : null;
  state.wanted = found && new Set(found);
  byId("count").textContent = found ? `${found.length.toLocaleString("en")} of ${points.rows.length.toLocaleString("en")}` : "";
  byId("matches").replaceChildren(...(found || []).slice(0, 24).map((i) => thumb(points.rows[i], 56)));
  drawMap();
}

function startMap() {
  const choose = (node, names, change) => {
    node.append(...names.map((name, i) => el("option", { value: i }, name)));
    node.addEventListener("change", () => { change(Number(node.value)); drawMap(); });
  };
  choose(byId("view"), maps.map((map) => map.title), (i) => { state.map = i; });
  choose(byId("colour"), columns.map((column) => column.name), (i) => { state.colour = i; });
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 150); });
  drawMap().then(() => {
    plot.on("plotly_hover", hover);
    plot.on("plotly_unhover", () => { byId("hover").hidden = true; });
    plot.on("plotly_click", (event) => select(event.points[0].customdata));
    document.documentElement.dataset.ready = "1";
  });
}
