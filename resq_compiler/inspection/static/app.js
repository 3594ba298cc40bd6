// The page: passes on the left, the graph in the middle, details of the selected node on the right.
"use strict";

const $ = (id) => document.getElementById(id);
const number = (value, digits = 3) => (value === null || value === undefined ? "" : Number(value).toPrecision(digits));
const secondsText = (s) => (s === undefined ? "" : s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);
const errorText = (value) => (value === null || value === undefined ? "" : value === 0 ? "0" : Number(value).toExponential(1));
let data, graph, current = 0;

async function start() {
  const asked = location.hash; // what is shown first changes it
  data = readData(await unpack($("data").textContent));
  $("model").textContent = data.manifest.model.split("/").pop();
  $("model").title = data.manifest.model;
  document.title = `resq: ${data.manifest.model || "dump"}`;
  stageList();
  graph = new GraphView($("canvas"), { onSelect: (name) => details(data.stage(current), name), onToggle: () => {} });
  const failed = data.stages.findIndex((s) => s.info.failed);
  showStage(failed >= 0 ? failed : data.stages.length - 1);
  legend();
  graph.fit(false);
  setUpGraph();
  setUpCompare();
  setUpKeyboard();
  linearsTable($("linears"));
  diagnostics($("diagnostics"));
  optionsTable($("options"));
  summary($("summary"));
  if (failed < 0) showTab("summary");
  else if (data.stages[failed].info.failed_node) reveal(failed, data.stages[failed].info.failed_node);
  followLink(asked);
  window.addEventListener("hashchange", () => followLink(location.hash));
  document.body.dataset.ready = "yes";
}

// Links into the page: index.html#compare, or #graph:15-quantize-kv-cache:quantize_12 for a node of a stage.
function followLink(link) {
  const [tab, label, name] = decodeURIComponent(link.slice(1)).split(":");
  if (!document.querySelector(`#tabs [data-tab="${CSS.escape(tab)}"]`)) return;
  showTab(tab);
  const stage = data.stages.find((s) => s.info.label === label);
  if (tab !== "graph" || !stage) return;
  if (name && data.stage(stage.index).byName.has(name)) reveal(stage.index, name);
  else showStage(stage.index);
}

const keepLink = (...parts) => history.replaceState(null, "", `#${parts.filter(Boolean).map(encodeURIComponent).join(":")}`);

function legend() {
  const key = (colour, text) => `<span><span class="swatch" style="background:${colour}"></span>${text}</span>`;
  if ($("compare").classList.contains("on"))
    return void ($("legend").innerHTML = ["added", "removed", "changed"].map((s) => key(STATUS[s], s)).join("") + key(STATUS.same, "equal"));
  if (graph.noise)
    return void ($("legend").innerHTML = key("#ffffff", "no rounding") + NOISE_STOPS.map(([db]) => key(noiseColour(db), `${db} dB`)).join(""));
  const order = (c) => (c === "float" ? 0 : c === "mixed" ? 99 : Number(c));
  const classes = [...new Set(data.pool.map((r) => r.precision))].sort((a, b) => order(a) - order(b));
  $("legend").innerHTML = classes.map((c) => key(colourOf(c), c === "float" ? "float" : c === "mixed" ? "mixed bits" : `${c}-bit`)).join("") +
    '<span><span class="swatch" style="background:#2b6cb0;width:5px"></span>made by this pass</span>';
}

function stageList() {
  $("stages").innerHTML = data.stages.map((stage, i) => {
    const { info } = stage, seconds = data.timing[info.label];
    const error = info.relative_error === null ? "" : `<span title="relative change of the logits on the example inputs">error ${errorText(info.relative_error)}</span>`;
    return `<button class="stage" data-index="${i}"><b>${esc(info.label)}</b>` +
      `<span class="numbers"><span>${info.nodes} nodes</span><span>${info.rewrites} rewrites</span></span>` +
      `<span class="numbers"><span>${secondsText(seconds)}</span>${error}${info.exact ? "" : '<span class="tag">quantizes</span>'}</span>` +
      (info.failed ? `<span class="failed">failed: ${esc(info.failed)}</span>` : "") + "</button>";
  }).join("") + '<details class="keys"><summary>keys</summary><dl id="keys"></dl></details>';
  $("stages").addEventListener("click", (event) => {
    const button = event.target.closest(".stage");
    if (!button) return;
    if ($("compare").classList.contains("on")) return compareWith(Number(button.dataset.index));
    showTab("graph");
    showStage(Number(button.dataset.index));
  });
}

function showStage(index) {
  current = index;
  for (const button of document.querySelectorAll(".stage")) {
    button.classList.toggle("on", Number(button.dataset.index) === index);
    if (Number(button.dataset.index) === index) button.scrollIntoView({ block: "nearest" });
  }
  const stage = data.stage(index), selected = graph.selected;
  graph.show(stage);
  if (selected && stage.byName.has(selected)) details(stage, selected);
  else overview(stage);
  search($("search").value);
  if ($("graph").classList.contains("on")) keepLink("graph", stage.info.label, graph.selected);
}

function showTab(name) {
  for (const button of document.querySelectorAll("#tabs button")) button.classList.toggle("on", button.dataset.tab === name);
  for (const tab of document.querySelectorAll(".tab")) tab.classList.toggle("on", tab.id === name);
  document.body.dataset.tab = name;
  if (name === "graph") keepLink("graph", data.stages[current].info.label, graph.selected);
  else keepLink(name);
  if (name === "compare") drawCompare();
  legend();
}

function reveal(index, name) {
  showTab("graph");
  if (index !== current) showStage(index);
  graph.reveal(name);
  $("tensors").checked = graph.tensors;
  details(data.stage(index), name);
}

// All of some nodes in the graph: their blocks open, each marked, the first in the middle.
function revealAll(stage, names) {
  reveal(stage.index, names[0]);
  graph.hits = new Set(names);
  graph.mark();
}

function overview(stage) {
  const counts = new Map();
  for (const record of stage.nodes) if (record.op === "call_function") counts.set(record.target, (counts.get(record.target) || 0) + 1);
  const rows = [...counts].sort((a, b) => b[1] - a[1]).map(([k, v]) => `<dt>${v}</dt><dd>${esc(k)}</dd>`).join("");
  const { info } = stage;
  $("details").innerHTML = `<h2>${esc(info.label)}</h2>` + (info.failed ? `<p class="failed-text">${esc(info.failed)}</p>` : "") +
    (info.options ? `<p><code>${esc(info.options)}</code></p>` : "") +
    (info.lines?.length ? `<pre>${esc(info.lines.join("\n"))}</pre>` : "") +
    `<p class="hint">Click a block to unfold it, a node for its details. Shapes are those of the example inputs.</p><h3>Operators</h3><dl class="counts">${rows}</dl>`;
}

const decibels = (db) => `<span class="swatch" style="background:${noiseColour(db)}"></span>${db} dB`;

// The row of a site in the diagnostics, if there are any.
function measuredAt(site) {
  for (const { columns, rows } of data.tables) {
    const row = columns.includes("kurtosis") && rows.find((r) => r.site === site);
    if (row) return columns.slice(1).filter((c) => row[c] !== undefined && row[c] !== null).map((c) => `<dt>${esc(c)}</dt><dd>${number(row[c], 4)}</dd>`).join("");
  }
  return "";
}

const link = (name) => `<a data-node="${esc(name)}">${esc(name)}</a>`;

// A name keeps the operator that made the node; a pass may have given it another one since.
const readerLine = (record) => `${link(record.name)}<span class="hint">${esc(record.target)} ${esc(record.bits)}</span>`;

function details(stage, name) {
  const record = stage.byName.get(name);
  if (!record) return;
  if ($("graph").classList.contains("on")) keepLink("graph", stage.info.label, name);
  const rows = [["operator", esc(record.target)], ["value", esc(shapeText(record)) || "unknown"], ["bits", esc(record.bits || "float")],
    ["block", record.block === null ? "outside the blocks" : record.block], ["module", esc(record.module || "–")], ["made by", esc(record.pass)]];
  const { Projection: projection, LinearPart: part, QuantizerSite: site, WeightNoise: weight, LinearSite: linear } = record.facts;
  if (projection) rows.push(["projection", `${projection.basis}${projection.inverse ? " inverse" : ""}`]);
  const owner = linear || (part && part.site);
  if (owner) rows.push(["original linear", `${esc(owner.name)} (${esc(owner.role)})`]);
  if (part) rows.push(["part", `${part.index}: columns ${part.start}–${part.stop}${part.heads > 1 ? ` of each of ${part.heads} heads` : ""}, ` +
    `planned W${part.weight_bits} A${part.activation_bits}`]);
  if (weight) rows.push(["weight noise", `${number(weight.relative)} of its norm`]);
  const noise = site && data.manifest.noise[site.name];
  if (site) rows.push(["quantizer", `${esc(site.name)} (${esc(site.kind)})`]);
  const rounded = part && data.manifest.noise[`${part.site.name}.part${part.index}`];
  if (rounded) rows.push(["weight SQNR", decibels(rounded.sqnr_db)]);
  if (noise) rows.push(["signal to noise", decibels(noise.sqnr_db)]);
  const measured = site && measuredAt(site.name.replace(/\.part\d+$/, ""));
  const stages = data.stages.filter((s) => data.stage(s.index).byName.has(name)).map((s) => s.info.label);
  const users = stage.users.get(name) || [];
  $("details").innerHTML = `<h2>%${esc(name)}</h2><dl>${rows.map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join("")}</dl>` +
    (measured ? `<h3>Measured at ${esc(site.name.replace(/\.part\d+$/, ""))}</h3><dl>${measured}</dl>` : "") +
    `<h3>Call</h3><code>${esc(record.text)}</code>` +
    `<h3>Inputs</h3><dl>${record.inputs.map((n) => `<dt>${esc(stage.byName.get(n).op === "get_attr" ? "tensor" : "")}</dt><dd>${link(n)} <span class="hint">${esc(shapeText(stage.byName.get(n)))}</span></dd>`).join("")}</dl>` +
    `<h3>Read by</h3><div class="users">${users.slice(0, 40).map((n) => readerLine(stage.byName.get(n))).join("") || "–"}</div>` +
    (users.length > 40 ? `<p class="hint">and ${users.length - 40} more</p>` : "") +
    `<h3>Stages</h3><div>${stages.length ? `${esc(stages[0])} … ${esc(stages[stages.length - 1])}` : ""}</div>`;
  for (const a of $("details").querySelectorAll("a[data-node]")) a.addEventListener("click", () => reveal(stage.index, a.dataset.node));
}

function expandAll() {
  graph.expanded = new Set(data.stage(current).blocks.keys());
  graph.draw();
}

function colourBy(noise) {
  graph.noise = noise ? (record) => noiseOf(data, record) : null;
  graph.draw();
  legend();
}

function setUpGraph() {
  $("expand").addEventListener("click", expandAll);
  $("collapse").addEventListener("click", () => { graph.expanded.clear(); graph.draw(); graph.fit(false); });
  $("tensors").addEventListener("change", (event) => { graph.tensors = event.target.checked; graph.draw(); });
  $("colour").addEventListener("change", (event) => colourBy(event.target.value === "noise"));
  $("fit").addEventListener("click", () => graph.fit());
  $("svg").addEventListener("click", saveSvg);
  for (const button of document.querySelectorAll(".zoom")) button.addEventListener("click", () => graph.zoom(Number(button.dataset.zoom)));
  $("tabs").addEventListener("click", (event) => event.target.dataset.tab && showTab(event.target.dataset.tab));
}

function saveSvg() {
  const copy = graph.svg.cloneNode(true), { width, height } = graph.extent;
  copy.setAttribute("viewBox", `-10 -10 ${width + 20} ${height + 20}`);
  copy.lastChild.removeAttribute("transform");
  const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
  style.textContent = [...document.querySelector("style").sheet.cssRules].map((r) => r.cssText).filter((t) => t.startsWith("svg ")).map((t) => t.slice(4)).join("\n") +
    "\ntext { font: 11px monospace; }";
  copy.prepend(style);
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
  a.download = `${data.stage(current).info.label}.svg`;
  a.click();
  URL.revokeObjectURL(a.href);
}

start();
