// The page of `tc serve`. Everything from a cache is set as text, never as HTML.
const PAGE = 48, MOST = 480, NEIGHBORS = 12, QUICK = 0.15, MANY_VALUES = 60, LARGEST = 23e6;
const at = (id) => document.getElementById(id);
const state = { text: "", picture: null, row: null, find: "", where: {}, top: PAGE };
const dropped = new Map(); // pictures of this page by number, so that the back button finds them
let caches = [], answers = [], running = null, quick = true, timer = 0, shown = null;

function make(tag, properties = {}, ...children) {
  const { data = {}, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, data);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body.values), signal: body.signal };
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `tc serve` still running?");
  }
  const values = await reply.json().catch(() => ({ error: `The server answered with status ${reply.status}` }));
  if (values.error) throw new Error(values.error);
  return values;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// ---------------------------------------------------------------------------------------------------
// What can be asked

function finds() {
  const names = new Set(caches.flatMap((cache) => Object.keys(cache.takes)));
  return ["pictures", "texts"].filter((name) => names.has(name));
}

function takes(what) {
  return caches.some((cache) => (cache.takes[state.find] ?? Object.values(cache.takes)[0] ?? []).includes(what));
}

function prepareQuery() {
  const teachers = [...new Set(caches.map((cache) => cache.teacher))].join(" and ");
  at("text").placeholder = takes("text")
    ? `Describe what you look for${takes("picture") ? ", or drop a picture" : ""}`
    : `${teachers} reads no texts: type the key of a row${takes("picture") ? " or drop a picture" : ""}, or click one`;
  at("pick").hidden = !takes("picture");
}

function option(value, text) {
  return make("option", { value, textContent: text });
}

function choice(name, values) {
  const select = make("select", { ariaLabel: name, title: name });
  select.append(option("", `any ${name}`), ...values.map(([value, count]) => option(value, `${value} (${count.toLocaleString()})`)));
  return select;
}

function typed(name, values, id) {
  const list = make("datalist", { id });
  list.append(...values.map(([value]) => option(value, value)));
  const input = make("input", { type: "text", placeholder: `any ${name}`, ariaLabel: name, title: name });
  input.setAttribute("list", id);
  return [input, list];
}

function makeFilters() {
  const nodes = [];
  if (finds().length > 1) {
    const select = make("select", { id: "find", ariaLabel: "find" });
    select.append(...finds().map((name) => option(name, `find ${name}`)));
    select.onchange = () => { state.find = select.value; prepareQuery(); search(); };
    nodes.push(select);
  }
  const facets = new Map(caches.toReversed().flatMap((cache) => cache.facets.map((facet) => [facet.name, facet])));
  for (const [name, facet] of facets) {
    const values = facet.values.map((value, i) => [value, facet.counts[i]]);
    const nodesOf = values.length + facet.more > MANY_VALUES ? typed(name, values, `values-${nodes.length}`) : [choice(name, values)];
    nodesOf[0].dataset.facet = name;
    nodesOf[0].onchange = (event) => {
      if (event.target.value) state.where[name] = event.target.value;
      else delete state.where[name];
      search();
    };
    nodes.push(...nodesOf);
  }
  at("filters").replaceChildren(...nodes);
}

// ---------------------------------------------------------------------------------------------------
// Search

function remember(push) {
  const words = new URLSearchParams();
  if (state.text) words.set("q", state.text);
  if (state.row) words.set("row", state.row.join("."));
  if (state.picture) words.set("picture", state.picture);
  if (state.find && finds().length > 1 && state.find !== finds()[0]) words.set("find", state.find);
  for (const [name, value] of Object.entries(state.where)) words.append("where", `${name}=${value}`);
  const hash = `#${words}`;
  if (hash !== (location.hash || "#")) history[push ? "pushState" : "replaceState"](null, "", hash);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.text = words.get("q") ?? "";
  const row = (words.get("row") ?? "").split(".").map(Number);
  state.row = row.length === 2 && row.every(Number.isInteger) ? row : null;
  state.picture = dropped.has(words.get("picture")) ? words.get("picture") : null;
  state.find = words.get("find") ?? finds()[0] ?? "";
  state.where = Object.fromEntries(words.getAll("where").map((pair) => [pair.split("=")[0], pair.slice(pair.indexOf("=") + 1)]));
  state.top = PAGE;
}

function request(values) {
  const typedKey = /^key:\s*(.+)$/.exec(values.text) ?? (values.text && !takes("text") ? ["", values.text] : null);
  return {
    text: typedKey ? "" : values.text, key: typedKey ? typedKey[1].trim() : "",
    picture: values.picture ? dropped.get(values.picture).split(",")[1] : "",
    row: values.row, find: finds().length > 1 ? values.find : "", where: values.where, top: values.top,
  };
}

async function search({ push = true, keep = false } = {}) {
  if (!keep) state.top = PAGE;
  remember(push);
  showQuery();
  running?.abort();
  running = new AbortController();
  const mine = running;
  at("columns").classList.add("busy");
  const waiting = setTimeout(() => notice(`Loading ${caches.map((cache) => cache.teacher).join(" and ")}: the first query takes longer`), 1500);
  try {
    const found = await ask("/api/search", { values: request(state), signal: mine.signal });
    clearTimeout(waiting);
    notice("");
    answers = found.answers;
    quick = Math.max(0, ...answers.map((answer) => answer.seconds?.encode ?? 0)) < QUICK;
    showAnswers();
  } catch (error) {
    clearTimeout(waiting);
    if (error.name === "AbortError") return;
    notice(error.message);
  }
  if (mine === running) at("columns").classList.remove("busy");
  document.documentElement.dataset.searches = Number(document.documentElement.dataset.searches ?? 0) + 1;
}

function part(image, text, remove) {
  const button = make("button", { type: "button", textContent: "\u2715", ariaLabel: `remove ${text}` });
  button.onclick = remove;
  return make("span", { className: "part" }, image, make("span", { textContent: text, title: text }), button);
}

function showQuery() {
  const parts = [];
  if (state.picture) {
    const image = make("img", { src: dropped.get(state.picture), alt: "" });
    parts.push(part(image, "your picture", () => { state.picture = null; search(); }));
  }
  if (state.row) {
    const [cache, row] = state.row;
    const image = caches[cache]?.pictures ? make("img", { src: `/picture/${cache}/${row}/small`, alt: "" }) : "";
    parts.push(part(image, "like this row", () => { state.row = null; search(); }));
  }
  at("parts").replaceChildren(...parts);
  if (document.activeElement !== at("text")) at("text").value = state.text;
  at("clear").hidden = !parts.length && !state.text && !Object.keys(state.where).length;
  if (at("find")) at("find").value = state.find;
  for (const node of document.querySelectorAll("[data-facet]")) {
    node.value = state.where[node.dataset.facet] ?? "";
    node.classList.toggle("set", node.value !== "");
  }
}

// ---------------------------------------------------------------------------------------------------
// Results

function frame(cache, result, size, className) {
  const words = result.texts[0] || result.key;
  if (!result.picture) return make("span", { className: `${className} words` }, words);
  const image = make("img", { src: `/picture/${cache}/${result.row}/${size}`, alt: words, loading: size === "small" ? "lazy" : "eager", draggable: false });
  const box = make("span", { className }, image);
  image.onerror = async () => {
    const reply = await fetch(image.src).catch(() => null);
    const reason = reply ? await reply.text() : "the server does not answer";
    box.classList.add("words");
    box.replaceChildren(`No picture: ${reason.trim().slice(0, 300)}`);
  };
  return box;
}

function otherRank(cache, result) {
  if (result.other === undefined) return make("span", { textContent: result.label });
  const name = caches[1 - cache].name, change = result.other - result.rank, beyond = result.beyond.toLocaleString();
  const [rank, title] = result.other === null ? ["-", `${name} has no such row`]
    : result.other === 0 ? [`>${beyond}`, `not among the first ${beyond} of ${name}`]
    : [`#${result.other}`, `rank ${result.other} in ${name}${change ? `: ${Math.abs(change)} ${change > 0 ? "lower" : "higher"}` : ", as here"}`];
  const distance = result.other ? Math.abs(change) : Infinity;
  const className = `there ${distance <= 3 ? "near" : distance <= 50 ? "off" : "far"}`;
  return make("span", { className, title }, make("span", { textContent: name }), rank);
}

function card(cache, result, open) {
  const facts = result.rank === undefined
    ? [make("span", { textContent: [result.label, result.split].filter(Boolean).join(" \u00b7 ") || result.key })]
    : [make("span", { textContent: result.score.toFixed(3), title: `cosine ${result.score}` }), otherRank(cache, result)];
  const caption = result.picture ? result.texts[0] ?? "" : result.label || result.key;
  const node = make("button", { type: "button", className: "card", title: result.key, data: { key: result.key, row: result.row } },
    frame(cache, result, "small", "frame"),
    make("span", { className: "about" }, make("span", { className: "caption", textContent: caption }), make("span", { className: "facts" }, ...facts)));
  if (result.rank !== undefined) node.firstChild.append(make("span", { className: "rank", textContent: result.rank }));
  node.onclick = open;
  return node;
}

function heading(cache, answer) {
  const about = answer.error ? "" : answer.results.length && answer.results[0].rank === undefined
    ? `${answer.results.length.toLocaleString()} of ${answer.total.toLocaleString()} rows`
    : `nearest of ${answer.total.toLocaleString()}`;
  const seconds = answer.seconds ? answer.seconds.search + answer.seconds.rows : null;
  const notes = [about, answer.seconds ? (answer.exact ? "exact" : answer.note) : "", seconds === null ? "" : `${Math.max(1, Math.round(1000 * seconds))} ms`];
  const name = caches.length > 1 ? caches[cache].name : "";
  return make("h2", {}, name, make("span", { className: "quiet", textContent: notes.filter(Boolean).join(" \u00b7 ") }));
}

function column(answer) {
  const { cache } = answer;
  if (answer.error) return make("section", { className: "column" }, heading(cache, answer), make("p", { className: "empty", textContent: answer.error }));
  const grid = make("div", { className: "grid" });
  grid.append(...answer.results.map((result, i) => card(cache, result, () => enlarge(cache, result, answer.results, i))));
  const empty = answer.results.length ? "" : make("p", { className: "empty", textContent: "No row has these values: change the filters." });
  return make("section", { className: "column", data: { cache } }, heading(cache, answer), grid, empty);
}

function showAnswers() {
  at("columns").classList.toggle("two", answers.length > 1);
  at("columns").replaceChildren(...answers.map(column));
  at("more").hidden = state.top >= MOST || !answers.some((answer) => answer.results?.length === state.top && answer.total > state.top);
}

at("columns").addEventListener("mouseover", (event) => {
  const key = event.target.closest(".card")?.dataset.key;
  if (caches.length < 2) return;
  for (const node of document.querySelectorAll("#columns .card")) node.classList.toggle("same", key !== undefined && node.dataset.key === key);
});

// ---------------------------------------------------------------------------------------------------
// The large view

function factsOf(cache, result, details) {
  const list = make("dl");
  const score = result.score === undefined ? "" : `${result.score.toFixed(4)} (rank ${result.rank})`;
  const facts = { key: details.key, label: details.label, split: details.split, score, file: details.image, problem: details.problem, ...details.task };
  for (const [name, value] of Object.entries(facts)) {
    if (value === "" || value === null || value === undefined) continue;
    list.append(make("dt", { textContent: name }), make("dd", { textContent: typeof value === "string" ? value : JSON.stringify(value) }));
  }
  const button = make("button", { type: "button", className: "action", textContent: "Search by this row" });
  button.onclick = () => { at("large").close(); Object.assign(state, { row: [cache, result.row], text: "", picture: null }); at("text").value = ""; search(); };
  const more = details.texts.length > 1 ? make("ul", {}, ...details.texts.slice(1).map((text) => make("li", { textContent: text }))) : "";
  return make("div", { className: "facts-of" }, make("h2", { textContent: details.texts[0] ?? details.key }), more, list, button);
}

async function neighborsOf(cache, result, box) {
  const values = request({ text: "", picture: null, row: [cache, result.row], find: state.find, where: state.where, top: NEIGHBORS });
  try {
    const found = await ask("/api/search", { values });
    box.replaceChildren(...found.answers.map((answer) => {
      const title = caches.length > 1 ? `Neighbors in ${caches[answer.cache].name}` : "Neighbors";
      if (answer.error) return make("section", { className: "neighbors" }, make("h3", { textContent: title }), make("p", { className: "quiet", textContent: answer.error }));
      const strip = make("div", { className: "strip" });
      strip.append(...answer.results.map((near, i) => card(answer.cache, near, () => enlarge(answer.cache, near, answer.results, i))));
      return make("section", { className: "neighbors", data: { cache: answer.cache } }, make("h3", { textContent: title }), strip);
    }));
  } catch (error) {
    box.replaceChildren(make("p", { className: "neighbors quiet", textContent: error.message }));
  }
}

async function enlarge(cache, result, list, place) {
  const mine = shown = { cache, list, place };
  try {
    const details = await ask(`/api/row/${cache}/${result.row}`);
    if (mine !== shown) return;
    const box = make("div", { className: "around" });
    const picture = frame(cache, { ...result, texts: details.texts }, "large", "picture");
    at("whole").replaceChildren(make("div", { className: "sides" }, picture, factsOf(cache, result, details)), box);
    if (!at("large").open) at("large").showModal();
    at("large").scrollTop = 0;
    await neighborsOf(cache, result, box);
  } catch (error) {
    notice(error.message);
  }
}

function step(by) {
  const place = shown.place + by;
  if (place >= 0 && place < shown.list.length) enlarge(shown.cache, shown.list[place], shown.list, place);
}

// ---------------------------------------------------------------------------------------------------
// What a person does

function readPicture(file) {
  if (!file) return;
  if (!takes("picture")) { notice(`${caches[0].teacher} reads no pictures: search by a text or a row`); return; }
  if (file.size > LARGEST) { notice(`${file.name} is larger than ${LARGEST / 1e6} MB: search by a smaller picture`); return; }
  const reader = new FileReader();
  reader.onload = () => {
    const number = String(dropped.size + 1);
    dropped.set(number, reader.result);
    at("text").value = "";
    Object.assign(state, { picture: number, row: null, text: "" });
    search();
  };
  reader.readAsDataURL(file);
}

at("ask").onsubmit = (event) => { event.preventDefault(); clearTimeout(timer); state.text = at("text").value.trim(); search(); };
at("text").oninput = () => {
  clearTimeout(timer);
  if (!quick || !takes("text")) return;
  timer = setTimeout(() => { state.text = at("text").value.trim(); if (!state.text.startsWith("key:")) search({ push: false }); }, 350);
};
at("clear").onclick = () => { at("text").value = ""; Object.assign(state, { text: "", picture: null, row: null, where: {} }); search(); };
at("home").onclick = (event) => { event.preventDefault(); at("clear").onclick(); };
at("pick").onclick = () => at("file").click();
at("file").onchange = () => { readPicture(at("file").files[0]); at("file").value = ""; };
at("more").onclick = () => { state.top = Math.min(MOST, state.top * 2); search({ push: false, keep: true }); };
at("close").onclick = () => at("large").close();
at("large").onclick = (event) => { if (event.target === at("large")) at("large").close(); };
at("large").onclose = () => { shown = null; };
addEventListener("popstate", () => { at("large").close(); recall(); at("text").value = state.text; search({ push: false }); });
addEventListener("keydown", (event) => {
  if (at("large").open && shown && event.key === "ArrowRight") step(1);
  if (at("large").open && shown && event.key === "ArrowLeft") step(-1);
  if (event.key === "/" && !at("large").open && !/INPUT|SELECT/.test(document.activeElement.tagName)) { event.preventDefault(); at("text").focus(); }
});
let inside = 0; // dragenter and dragleave come for every node
addEventListener("dragenter", (event) => { if (event.dataTransfer.types.includes("Files")) { inside += 1; at("drop").hidden = false; } });
addEventListener("dragleave", () => { inside = Math.max(0, inside - 1); at("drop").hidden = inside === 0; });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); inside = 0; at("drop").hidden = true; readPicture(event.dataTransfer.files[0]); });

async function start() {
  caches = await ask("/api/caches");
  recall();
  const about = new Map(); // teachers by what they were run over
  for (const cache of caches) {
    const data = `${cache.data}, ${cache.rows.toLocaleString()} rows${cache.views ? `, ${cache.views} views each` : ""}`;
    about.set(data, [...(about.get(data) ?? []), cache.teacher]);
  }
  at("about").textContent = [...about].map(([data, teachers]) => `${teachers.join(" and ")} over ${data}`).join("; ");
  document.title = `${caches.map((cache) => cache.name).join(" and ")} - teachercache`;
  prepareQuery();
  makeFilters();
  at("text").value = state.text;
  await search({ push: false });
  if (takes("text") || takes("picture")) {
    const problems = await ask("/api/teachers", { values: {} });
    if (problems.some(Boolean)) notice(`${problems.filter(Boolean)[0]}. Rows can be searched by rows.`);
  }
  document.documentElement.dataset.ready = "";
}
start().catch((error) => notice(error.message));
