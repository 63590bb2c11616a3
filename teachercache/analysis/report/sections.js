/* The sections below the map, each made when it comes near the window. */

function tiles() {
  byId("subtitle").textContent = [report.cache.path, report.against ? `beside ${report.against.cache.path}` : "", report.made].filter(Boolean).join(", ");
  const space = report.space || {};
  const said = [["rows", report.cache.num_rows], ["usable", report.cache.usable], ["texts", report.cache.texts], ["dimensions", report.cache.dim]];
  if (report.pairs) said.push(["own text, mean cosine", report.pairs.mean], ["others' texts", report.pairs.others_mean]);
  if (report.retrieval) said.push(["text->image R@1", report.retrieval.text_to_image["R@1"]], ["image->text R@1", report.retrieval.image_to_text["R@1"]]);
  if (space.modality_gap !== undefined) said.push(["modality gap", space.modality_gap]);
  for (const [name, one] of Object.entries({ pictures: space.pictures, texts: space.texts })) if (one) said.push([`effective rank, ${name}`, one.effective_rank]);
  if (report.duplicates) said.push(["groups of near duplicates", report.duplicates.near_groups], ["across splits", report.duplicates.leaks]);
  if (report.quarantine.count) said.push(["quarantined", report.quarantine.count]);
  const other = report.against;
  if (other && other.pictures) said.push(["CKA of pictures", other.pictures.cka]);
  if (other && other.neighbourhoods) said.push(["neighbors kept @10", other.neighbourhoods.overlap["10"]]);
  byId("numbers").append(...said.map(([name, value]) => el("div", { class: "tile" }, el("b", null, figure(value)), el("span", null, name))));
}

const note = (text) => el("p", { class: "quiet" }, text);
const plotBox = () => el("div", { class: "plot" });

function table(header, rows) {
  return el("div", { class: "scroll" }, el("table", null, el("thead", null, el("tr", null, ...header.map((name) => el("th", null, name)))),
    el("tbody", null, ...rows.map((row) => el("tr", null, ...row.map((cell) => el("td", null, cell)))))));
}

function bars(node, title, x, series, more = {}) {
  chart(node, () => ({ traces: series.map((one, i) => ({ type: "bar", x, y: one.y, name: one.name, marker: { color: PALETTE[i] }, ...more })),
    layout: { title: { text: title, font: { size: 13 } }, showlegend: series.length > 1, barmode: more.barmode || "group", bargap: more.bargap, legend: { orientation: "h", y: 1.08 }, xaxis: { type: more.axis } } }));
}

function pairsSection(node) {
  const { histogram, worst } = report.pairs;
  const middle = histogram.own.map((_, i) => (histogram.edges[i] + histogram.edges[i + 1]) / 2);
  const [left, right] = [plotBox(), plotBox()];
  node.append(note(`Mean cosine ${figure(report.pairs.mean)} to a picture's own texts and ${figure(report.pairs.others_mean)} to those of others; in ${percent(report.pairs.auc)} of the cases the own one is the nearer.`), el("div", { class: "charts" }, left, report.matrix ? right : ""));
  bars(left, "cosine of picture and text", middle, [{ name: "own", y: histogram.own }, { name: "of another row", y: histogram.others }], { barmode: "overlay", opacity: 0.7, bargap: 0 });
  if (report.matrix) {
    chart(right, () => ({ traces: [{ type: "heatmap", z: report.matrix.values, colorscale: "Viridis", colorbar: { thickness: 12 }, hoverinfo: "z" }],
      layout: { title: { text: `${report.matrix.rows.length} pictures (down) by their texts: diagonal ${figure(report.matrix.diagonal)}, rest ${figure(report.matrix.rest)}`, font: { size: 13 } }, yaxis: { autorange: "reversed" } } }));
  }
  node.append(el("h3", null, "Worst pairs: likely wrong captions"), note("Where picture and text go far better with others than with each other: their contrastive loss, highest first. One text a row."),
    el("div", { class: "grid" }, ...worst.map((one) => rowItem(one.row, `surprise ${figure(one.surprise, 1)}, cosine ${figure(one.cosine, 2)}`, one.text))));
}

function duplicatesSection(node) {
  const found = report.duplicates;
  const scope = found.asked < found.num_rows ? ` Of ${figure(found.num_rows)} rows ${figure(found.asked)} drawn by chance were compared with all; \`tc index\` first, and all are.` : "";
  node.append(note(`Cosine of at least ${found.threshold}: ${figure(found.pairs)} pairs in ${figure(found.near_groups)} groups, ${figure(found.exact_groups)} with the very same vector; ${figure(found.leaks)} groups across splits.${scope}${found.approximate ? " Found with the FAISS index: a few may be missing." : ""}`));
  node.append(el("div", { class: "groups" }, ...found.groups.map((group) => el("div", { class: "group", style: `grid-column: span ${Math.min(4, Math.ceil(group.rows.length / 4))}` }, el("div", { class: "quiet" }, `${group.rows.length} rows, cosine ${group.exact ? "1, the same vector" : `from ${figure(group.cosine)}`} `,
    group.leak ? el("span", { class: "warn" }, `leak: ${group.splits.map((name) => name || "(none)").join(", ")}`) : ""), el("div", { class: "strip" }, ...group.rows.slice(0, 16).map((row) => rowOr(row)))))));
}

const rowOr = (row) => (points.thumbs.any ? thumb(row, 72) : rowItem(row, ""));

function outliersSection(node) {
  const found = report.outliers;
  node.append(note(`1 - the mean cosine to the ${found.neighbours} nearest others, highest first${found.asked < found.num_rows ? `; ${figure(found.asked)} of ${figure(found.num_rows)} rows were asked, those far from every cluster among them` : ""}.`),
    el("div", { class: "grid" }, ...found.worst.map((one) => rowItem(one.row, `distance ${figure(one.distance)}`))));
}

function spaceSection(node) {
  const [left, right] = [plotBox(), plotBox()];
  const space = report.space;
  const kinds = ["pictures", "texts"].filter((name) => space[name]);
  const said = [["dim", "dimensions"], ["effective_rank", "effective rank"], ["dims_for_90_percent", "dimensions for 90 % of the variance"], ["mean_cosine", "mean cosine of two rows (anisotropy)"], ["uniformity", "uniformity (lower: more even)"]];
  node.append(table(["", ...kinds], said.map(([name, title]) => [title, ...kinds.map((kind) => figure(space[kind][name]))])));
  if (space.modality_gap !== undefined) node.append(note(`Modality gap ${figure(space.modality_gap)} (distance of the two centres), alignment ${figure(report.pairs.alignment)} (mean squared distance of a pair).`));
  const hubness = report.hubness;
  if (hubness) node.append(note(`Hubness: the number of times a row is among the ${hubness.neighbours} nearest of another has skewness ${figure(hubness.skewness)}, at most ${figure(hubness.most)}; ${percent(hubness.never)} of the rows never are.`));
  node.append(el("div", { class: "charts" }, left, right));
  chart(left, () => ({ traces: kinds.map((kind, i) => ({ type: "scatter", mode: "lines", name: kind, y: space[kind].spectrum, line: { color: PALETTE[i] } })),
    layout: { title: { text: "share of the variance by axis", font: { size: 13 } }, yaxis: { type: "log" }, showlegend: kinds.length > 1, legend: { orientation: "h", y: 1.08 } } }));
  if (!hubness) right.remove();
  else right.replaceWith(el("div", null, el("h3", null, "Hubs: near to everything"), el("div", { class: "strip" }, ...hubness.hubs.map((hub) => rowOr(hub.row)))));
}

function clustersSection(node) {
  node.append(note("k-means over the vectors; the words are those that YAKE finds to matter most in the texts of each group."));
  node.append(...report.clusters.map((one) => el("div", { class: "group" }, el("b", null, one.keywords.join(", ") || `group ${one.number}`), el("span", { class: "quiet" }, `  ${figure(one.size)} rows`), el("div", { class: "strip" }, ...one.rows.map((row) => rowOr(row))))));
}

function slicesSection(node) {
  for (const [kind, rows] of Object.entries(report.slices)) {
    const names = Object.keys(rows[0]).filter((name) => !["name", "num_rows"].includes(name));
    node.append(el("h3", null, `by ${kind}`), table([kind, "rows", ...names], rows.map((row) => [row.name, figure(row.num_rows), ...names.map((name) => figure(row[name]))])));
  }
}

function retrievalSection(node) {
  const names = ["R@1", "R@5", "R@10", "median_rank"];
  node.append(note("Strict ranks: a tie is lost."), table(["", ...names, "queries", "candidates"], Object.entries(report.retrieval).map(([way, one]) => [way.replace("_to_", " -> "), ...names.map((name) => figure(one[name])), figure(one.queries), figure(one.candidates)])));
}

function quarantineSection(node) {
  const found = report.quarantine;
  node.append(note(`${figure(found.count)} rows or texts cannot be used.`), table(["reason", "rows"], Object.entries(found.reasons).map(([reason, count]) => [reason, figure(count)])),
    el("details", null, el("summary", null, "the first of them"), table(["key", "reason"], found.first.map((one) => [one.key, one.reason]))));
}

function againstSection(node) {
  const other = report.against;
  const joined = other.joined;
  node.append(note(`${report.cache.path} (first) beside ${other.cache.path} (second): ${figure(joined.both)} rows joined by key, ${figure(joined.first_alone)} in the first alone, ${figure(joined.second_alone)} in the second alone.`));
  const kinds = ["pictures", "texts"].filter((name) => other[name]);
  const said = [["cka", "linear CKA, unbiased (1: the same up to rotation)"], ["procrustes", "left over after the best rotation (0: nothing)"], ["rank_correlation", "rank correlation of cosines"]];
  if (kinds.length) node.append(table(["", ...kinds], [...said.map(([name, title]) => [title, ...kinds.map((kind) => figure(other[kind][name]))]),
    ...["effective_rank", "mean_cosine"].map((name) => [`${name.replace("_", " ")}: first, second`, ...kinds.map((kind) => other[kind][name].map((value) => figure(value)).join(", "))])]));
  for (const [name, reason] of Object.entries(other.left_out)) node.append(note(`${name}: ${reason}`));
  const found = other.neighbourhoods;
  if (found) {
    const box = plotBox();
    node.append(box);
    const ks = Object.keys(found.overlap);
    bars(box, "share of the k nearest that both find", ks.map((k) => `@${k}`), [{ name: "both caches", y: ks.map((k) => found.overlap[k]) }, { name: "by chance", y: ks.map((k) => found.by_chance[k]) }], { axis: "category" });
  }
  if (other.retrieval) retrievalAgainst(node, other.retrieval);
  if (found) changesAgainst(node, found);
}

function retrievalAgainst(node, found) {
  const names = ["R@1", "R@5", "R@10", "median_rank"];
  const rows = ["text_to_image", "image_to_text"].flatMap((way) => found[way].map((one, i) => [`${way.replace("_to_", " -> ")}, ${i ? "second" : "first"}`, ...names.map((name) => figure(one[name]))]));
  node.append(el("h3", null, "Retrieval"), table(["", ...names], rows));
  for (const [name, title] of [["lost", "found by the first, lost by the second"], ["gained", "found by the second alone"]]) {
    node.append(el("details", { open: name === "lost" ? "" : undefined }, el("summary", null, `${figure(found[name].count)} texts whose picture is ${title} (among the first ${found.at})`),
      el("div", { class: "grid" }, ...found[name].worst.map((one) => rowItem(one.row, `rank ${one.ranks[0]} -> ${one.ranks[1]}`, one.text)))));
  }
}

function changesAgainst(node, found) {
  node.append(el("h3", null, "Rows whose neighbours changed most"), note(`Fewest of the ${found.changed_at} nearest in common; among equals those whose new neighbours are furthest away for the first cache. Framed: in both lists.`));
  node.append(el("div", { class: "change" }, el("b", null, "row"), el("b", null, "nearest in the first"), el("b", null, "nearest in the second")),
    ...found.changed.map((one) => {
      const [a, b] = [new Set(one.neighbours), new Set(one.neighbours_against)];
      const side = (rows, others) => el("div", points.thumbs.any ? { class: "strip" } : {}, ...rows.map((row) => (points.thumbs.any ? thumb(row, 72, others.has(row)) : rowItem(row, others.has(row) ? "in both" : ""))));
      return el("div", { class: "change" }, rowItem(one.row, `${percent(one.overlap)} kept`), side(one.neighbours, b), side(one.neighbours_against, a));
    }));
}

function leftOutSection(node) {
  node.append(...Object.entries(report.left_out).map(([name, reason]) => note(`${name}: ${reason}`)));
}

const SECTIONS = [["against", "Two caches", againstSection], ["pairs", "Pictures and their texts", pairsSection], ["duplicates", "Duplicates", duplicatesSection],
  ["outliers", "Outliers", outliersSection], ["clusters", "Groups", clustersSection], ["slices", "Slices", slicesSection], ["retrieval", "Retrieval", retrievalSection],
  ["space", "The space", spaceSection], ["quarantine", "Quarantined rows", quarantineSection], ["left_out", "Left out", leftOutSection]];

function startSections() {
  const seen = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => fill(entry.target)), { rootMargin: "600px" });
  const makers = new Map();
  const fill = (node) => {
    seen.unobserve(node);
    const make = makers.get(node);
    makers.delete(node);
    if (make) { make(node); node.style.minHeight = ""; }
  };
  byId("nav").append(el("a", { href: "#map" }, "Map"));
  for (const [name, title, make] of SECTIONS) {
    const part = report[name];
    if (!part || (name === "quarantine" && !part.count) || !Object.keys(part).length) continue;
    const node = el("section", { id: name }, el("h2", null, title));
    node.style.minHeight = "300px";
    makers.set(node, make);
    byId("sections").append(node);
    byId("nav").append(el("a", { href: `#${name}`, onclick: () => fill(node) }, title));
    seen.observe(node);
  }
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    if (drawn.length || plot.data) { drawMap(); drawn.forEach((draw) => draw()); }
  };
  set(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => set(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  startSections();
  startMap();
}

tiles(); // before plotly is read, which takes longer than all else
