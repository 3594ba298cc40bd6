// The page: passes on the left, the graph in the middle, details of the selected node on the right.
"use strict";

const $ = (id) => document.getElementById(id);
const number = (value, digits = 3) => (value === null || value === undefined ? "" : Number(value).toPrecision(digits));
const secondsText = (s) => (s === undefined ? "" : s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);
const errorText = (value) => (value === null || value === undefined ? "" : value === 0 ? "0" : Number(value).toExponential(1));
let data, graph, current = 0;

async function start() {
  data = readData(await unpack($("data").textContent));
  $("model").textContent = data.manifest.model.split("/").pop();
  $("model").title = data.manifest.model;
  document.title = `resq: ${data.manifest.model || "dump"}`;
  legend();
  stageList();
  graph = new GraphView($("canvas"), { onSelect: (name) => details(data.stage(current), name), onToggle: () => {} });
  const failed = data.stages.findIndex((s) => s.info.failed);
  showStage(failed >= 0 ? failed : data.stages.length - 1);
  graph.fit(false);
  if (failed >= 0 && data.stages[failed].info.failed_node) reveal(failed, data.stages[failed].info.failed_node);
  setUpGraph();
  setUpCompare();
  linearsTable($("linears"));
  diagnostics($("diagnostics"));
  optionsTable($("options"));
  document.body.dataset.ready = "yes";
}

function legend() {
  const order = (c) => (c === "float" ? 0 : c === "mixed" ? 99 : Number(c));
  const classes = [...new Set(data.pool.map((r) => r.precision))].sort((a, b) => order(a) - order(b));
  $("legend").innerHTML = classes.map((c) => `<span><span class="swatch" style="background:${colourOf(c)}"></span>` +
    `${c === "float" ? "float" : c === "mixed" ? "mixed bits" : `${c}-bit`}</span>`).join("") +
    '<span><span class="swatch" style="background:#2b6cb0;width:5px"></span>made by this pass</span>';
}

function stageList() {
  $("stages").innerHTML = data.stages.map((stage, i) => {
    const { info } = stage, seconds = data.timing[info.label];
    const error = info.relative_error === null ? "" : `<span title="relative change of the logits on the example inputs">error ${errorText(info.relative_error)}</span>`;
    return `<button class="stage" data-index="${i}"><b>${esc(info.label)}</b>${info.exact ? "" : ' <span class="hint">quantizer</span>'}` +
      `<span class="numbers"><span>${info.nodes} nodes</span><span>${info.rewrites} rewrites</span></span>` +
      `<span class="numbers"><span>${secondsText(seconds)}</span>${error}</span>` +
      (info.failed ? `<span class="failed">failed: ${esc(info.failed)}</span>` : "") + "</button>";
  }).join("") + data.manifest.notes.map((n) => `<p class="hint" style="padding:0 12px">${esc(n)}</p>`).join("");
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
}

function showTab(name) {
  for (const button of document.querySelectorAll("#tabs button")) button.classList.toggle("on", button.dataset.tab === name);
  for (const tab of document.querySelectorAll(".tab")) tab.classList.toggle("on", tab.id === name);
  if (name === "compare") drawCompare();
}

function reveal(index, name) {
  showTab("graph");
  if (index !== current) showStage(index);
  graph.reveal(name);
  $("tensors").checked = graph.tensors;
  details(data.stage(index), name);
}

function overview(stage) {
  const counts = new Map();
  for (const record of stage.nodes) if (record.op === "call_function") counts.set(record.target, (counts.get(record.target) || 0) + 1);
  const rows = [...counts].sort((a, b) => b[1] - a[1]).map(([k, v]) => `<dt>${v}</dt><dd>${esc(k)}</dd>`).join("");
  const { info } = stage;
  $("details").innerHTML = `<h2>${esc(info.label)}</h2>` + (info.failed ? `<p class="failed-text">${esc(info.failed)}</p>` : "") +
    (info.options ? `<p><code>${esc(info.options)}</code></p>` : "") +
    `<p class="hint">Click a block to unfold it, a node for its details. Shapes are those of the example inputs.</p><h3>Operators</h3><dl>${rows}</dl>`;
}

const link = (name) => `<a data-node="${esc(name)}">${esc(name)}</a>`;

function details(stage, name) {
  const record = stage.byName.get(name);
  if (!record) return;
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
  if (noise) rows.push(["signal to noise", `${noise.sqnr_db} dB`]);
  const stages = data.stages.filter((s) => data.stage(s.index).byName.has(name)).map((s) => s.info.label);
  const users = stage.users.get(name) || [];
  $("details").innerHTML = `<h2>%${esc(name)}</h2><dl>${rows.map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join("")}</dl>` +
    `<h3>Call</h3><code>${esc(record.text)}</code>` +
    `<h3>Inputs</h3><dl>${record.inputs.map((n) => `<dt>${esc(stage.byName.get(n).op === "get_attr" ? "tensor" : "")}</dt><dd>${link(n)} <span class="hint">${esc(shapeText(stage.byName.get(n)))}</span></dd>`).join("")}</dl>` +
    `<h3>Read by</h3><div>${users.slice(0, 40).map(link).join(", ") || "–"}${users.length > 40 ? ` and ${users.length - 40} more` : ""}</div>` +
    `<h3>Stages</h3><div>${stages.length ? `${esc(stages[0])} … ${esc(stages[stages.length - 1])}` : ""}</div>`;
  for (const a of $("details").querySelectorAll("a[data-node]")) a.addEventListener("click", () => reveal(stage.index, a.dataset.node));
}

// ---- search: every word must occur in the node's name, operator, module, bits, pass or facts ----
function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const stage = data.stage(current);
  const hits = words.length ? stage.nodes.filter((record) => {
    const text = `${record.name} ${record.target} ${record.module} ${record.bits} ${record.pass} ${JSON.stringify(record.facts)}`.toLowerCase();
    return words.every((w) => text.includes(w));
  }).sort((a, b) => (a.op === "get_attr") - (b.op === "get_attr")) : [];
  graph.hits = new Set(hits.map((r) => r.name));
  graph.mark();
  $("hits").textContent = words.length ? `${hits.length} found${hits.length ? " (Enter: next)" : ""}` : "";
  return hits;
}

function setUpGraph() {
  let next = 0;
  $("search").addEventListener("input", () => { next = 0; search($("search").value); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const hits = search($("search").value);
    if (hits.length) reveal(current, hits[next++ % hits.length].name);
    search($("search").value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement.tagName !== "INPUT") { event.preventDefault(); $("search").focus(); }
  });
  $("expand").addEventListener("click", () => { graph.expanded = new Set(data.stage(current).blocks.keys()); graph.draw(); });
  $("collapse").addEventListener("click", () => { graph.expanded.clear(); graph.draw(); graph.fit(false); });
  $("tensors").addEventListener("change", (event) => { graph.tensors = event.target.checked; graph.draw(); });
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
