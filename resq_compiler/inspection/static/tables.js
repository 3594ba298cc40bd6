// Tables: original linears and their parts, diagnostics, options.
"use strict";

function lastGoodStage() {
  const good = data.stages.filter((s) => !s.info.failed);
  return data.stage(good.length ? good[good.length - 1].index : 0);
}

function linearsTable(element) {
  const stage = lastGoodStage(), rows = [];
  for (const { site, parts } of linearsOf(stage).values()) {
    parts.forEach(({ part, record }, i) => {
      const noise = noiseOfPart(data, stage, record);
      const head = i ? "" : `<td rowspan="${parts.length}">${esc(site.name)}</td><td rowspan="${parts.length}">${esc(site.role)}</td><td rowspan="${parts.length}" class="number">${site.block ?? ""}</td>`;
      const columns = part ? `${part.start}–${part.stop}${part.heads > 1 ? ` × ${part.heads} heads` : ""}` : "all";
      rows.push(`<tr>${head}<td class="number">${part ? part.index : ""}</td><td>${columns}</td>` +
        `<td><span class="swatch" style="background:${colourOf(record.precision)}"></span>${esc(record.bits || "float")}</td>` +
        `<td class="number">${noise.weight ?? ""}</td><td class="number">${noise.input ?? ""}</td>` +
        `<td><a data-node="${esc(record.name)}">${esc(record.name)}</a></td><td>${esc(stage.byName.get(record.inputs[0])?.name ?? "")}</td></tr>`);
    });
  }
  element.innerHTML = `<h2>Original linears and their parts in ${esc(stage.info.label)}</h2>` +
    (rows.length ? `<p class="hint">Columns of the input in the order [low | high]; signal to noise in dB. Click a node to see it in the graph.</p>
    <table><thead><tr><th>linear</th><th>role</th><th>block</th><th>part</th><th>columns</th><th>bits</th><th>weight SQNR</th><th>input SQNR</th><th>node</th><th>reads</th></tr></thead>
    <tbody>${rows.join("")}</tbody></table>` : '<p class="hint">No pass has labelled the linears yet (find-topology does).</p>');
  element.addEventListener("click", (event) => {
    if (event.target.dataset.node) reveal(stage.index, event.target.dataset.node);
  });
}

function anyTable(columns, rows) {
  const cell = (v) => (typeof v === "number" ? `<td class="number">${Number.isInteger(v) ? v : number(v, 4)}</td>` : `<td>${esc(v ?? "")}</td>`);
  return `<table><thead><tr>${columns.map((c) => `<th>${esc(c)}</th>`).join("")}</tr></thead><tbody>` +
    rows.map((row) => `<tr>${columns.map((c) => cell(row[c])).join("")}</tr>`).join("") + "</tbody></table>";
}

function diagnostics(element) {
  const parts = data.plots.map((p) => `<figure><img alt="${esc(p.title)}" src="data:image/png;base64,${p.png}"><figcaption>${esc(p.title)}</figcaption></figure>`);
  for (const table of data.tables) {
    if (!table.rows.length) parts.push(`<h2>${esc(table.title)}</h2><p class="hint">none found</p>`);
    else parts.push(`<h2>${esc(table.title)}</h2>${anyTable(table.columns, table.rows)}<br>`);
  }
  element.innerHTML = parts.join("") || `<p class="hint">No diagnostics in this dump. Add them with <code>resq inspect MODEL --dump DIR --activations --attribute</code>.</p>`;
}

function optionsTable(element) {
  const rows = Object.entries(data.manifest.options).map(([option, value]) => ({ option, value: String(value) }));
  element.innerHTML = `<h2>Options of this compile</h2>${anyTable(["option", "value"], rows)}<p class="hint">${esc(data.manifest.made_by)}</p>`;
}
