// Tables: original linears and their subgraphs, diagnostics, options.
"use strict";

function lastGoodStage() {
  const good = data.stages.filter((s) => !s.info.failed);
  return data.stage(good.length ? good[good.length - 1].index : 0);
}

// The nodes that one part of a linear became: columns, quantizer, product, and the sum with the other parts.
function subgraphOf(stage, record) {
  const chain = [record];
  while (["quantize", "dequantize", "columns"].includes(stage.byName.get(chain[0].inputs[0])?.target))
    chain.unshift(stage.byName.get(chain[0].inputs[0]));
  const sum = (stage.users.get(record.name) || []).map((n) => stage.byName.get(n)).find((r) => r.target === "add" && r.module === record.module);
  return sum ? [...chain, sum] : chain;
}

// Where a linear was before any pass changed it: the first stage in which it is labelled as a whole.
function originalsOf() {
  const found = new Map();
  for (const { index } of data.stages) {
    for (const record of data.stage(index).nodes) {
      const site = record.facts.LinearSite;
      if (site && !found.has(site.name)) found.set(site.name, [index, record.name]);
    }
    if (found.size) break;
  }
  return found;
}

function linearsTable(element) {
  const stage = lastGoodStage(), originals = originalsOf(), linears = linearsOf(stage), rows = [];
  for (const [name, { site, parts }] of linears) {
    const [at, original] = originals.get(name) || [];
    for (const { part, record } of parts) {
      const noise = noiseOfPart(data, stage, record);
      const columns = part ? `${part.start}–${part.stop}${part.heads > 1 ? ` × ${part.heads} heads` : ""}` : "all";
      const chain = subgraphOf(stage, record).map((r) => `<a data-node="${esc(r.name)}" title="${esc(r.name)}">${esc(r.target)}</a>`).join(" → ");
      rows.push(`<tr><td><a data-linear="${esc(name)}">${esc(name)}</a></td><td>${esc(site.role)}</td><td class="number">${site.block ?? ""}</td>` +
        `<td>${original ? `<a data-stage="${at}" data-node="${esc(original)}" title="${esc(data.stages[at].info.label)}">${esc(original)}</a>` : ""}</td>` +
        `<td class="number">${part ? part.index : ""}</td><td class="columns">${columns}</td><td class="bits"><span class="swatch" style="background:${colourOf(record.precision)}"></span>${esc(record.bits || "float")}</td>` +
        `<td class="number">${noise.weight ?? ""}</td><td class="number">${noise.input ?? ""}</td><td class="chain">${chain}</td></tr>`);
    }
  }
  element.innerHTML = `<h2>Original linears and what they became in ${esc(stage.info.label)}</h2>` +
    (rows.length ? `<p><input id="linear-filter" type="search" placeholder="Filter: down_proj, W8A8, layers.3 ..."> <span class="hint">Columns of the input in the order [low | high]; signal to noise in dB.
    A click on a linear shows all its parts in the graph, on a node that node, on a heading sorts.</span></p>
    <table><thead><tr><th>linear</th><th>role</th><th>block</th><th>was</th><th>part</th><th>columns</th><th>bits</th><th>weight SQNR</th><th>input SQNR</th><th>subgraph</th></tr></thead>
    <tbody>${rows.join("")}</tbody></table>` : '<p class="hint">No pass has labelled the linears yet (find-topology does).</p>');
  if (!rows.length) return;
  const table = element.querySelector("table");
  sortable(table);
  $("linear-filter").addEventListener("input", () => filterRows(table, $("linear-filter").value));
  element.addEventListener("click", ({ target: { dataset } }) => {
    if (dataset.linear) revealAll(stage, linears.get(dataset.linear).parts.flatMap(({ record }) => subgraphOf(stage, record).map((r) => r.name)));
    else if (dataset.node) reveal(dataset.stage ? Number(dataset.stage) : stage.index, dataset.node);
  });
}

function anyTable(columns, rows, nodes = new Map()) {
  const cell = (v) => (typeof v === "number" ? `<td class="number">${Number.isInteger(v) ? v : number(v, 4)}</td>` :
    `<td>${nodes.has(v) ? `<a data-node="${esc(nodes.get(v))}">${esc(v)}</a>` : esc(v ?? "")}</td>`);
  return `<table><thead><tr>${columns.map((c) => `<th>${esc(c)}</th>`).join("")}</tr></thead><tbody>` +
    rows.map((row) => `<tr>${columns.map((c) => cell(row[c])).join("")}</tr>`).join("") + "</tbody></table>";
}

// Names of sites and of linears in the diagnostics -> the node to show.
function nodesOfNames(stage) {
  const found = new Map();
  for (const record of stage.nodes) {
    const { LinearPart: part, QuantizerSite: site } = record.facts;
    for (const name of [site && site.name.replace(/\.part\d+$/, ""), part && part.site.name]) if (name && !found.has(name)) found.set(name, record.name);
  }
  return found;
}

function diagnostics(element) {
  const stage = lastGoodStage(), nodes = nodesOfNames(stage);
  const parts = data.plots.map((p) => `<figure><img alt="${esc(p.title)}" src="data:image/png;base64,${p.png}"><figcaption>${esc(p.title)}</figcaption></figure>`);
  for (const table of data.tables) {
    if (!table.rows.length) parts.push(`<h2>${esc(table.title)}</h2><p class="hint">none found</p>`);
    else parts.push(`<h2>${esc(table.title)}</h2><div class="tall">${anyTable(table.columns, table.rows, nodes)}</div>`);
  }
  element.innerHTML = parts.join("") || `<p class="hint">No diagnostics in this dump. Add them with <code>resq inspect MODEL --dump DIR --activations --attribute</code>.</p>`;
  for (const table of element.querySelectorAll("table")) sortable(table);
  element.addEventListener("click", (event) => event.target.dataset.node && reveal(stage.index, event.target.dataset.node));
}

// As one writes it: lists and tables of an option are JSON, nothing is none.
const optionText = (value) => (value === null || value === "" || (typeof value === "object" && !Object.keys(value).length) ? "none" :
  typeof value === "object" ? JSON.stringify(value) : String(value));

function optionsTable(element) {
  const rows = Object.entries(data.manifest.options).map(([option, value]) => ({ option, value: optionText(value) }));
  element.innerHTML = `<h2>Options of this compile</h2>${anyTable(["option", "value"], rows)}<p class="hint">${esc(data.manifest.made_by)}</p>`;
}
