// The first look: what the model became, where the noise is (a heat map and a ranked table), what costs the accuracy.
"use strict";

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function summary(element) {
  const stage = lastGoodStage(), sites = noiseSites(data, stage);
  element.innerHTML = `<div class="cards">${cards().join("")}</div>` + notes() + costBars() + heatMap(sites) + siteTable(sites);
  element.addEventListener("click", (event) => {
    const target = event.target.closest("[data-node]");
    if (target && target.dataset.node) reveal(stage.index, target.dataset.node);
    if (event.target.dataset.tab) showTab(event.target.dataset.tab);
  });
  sortable(element.querySelector("#sites"));
  const filter = element.querySelector("#site-filter");
  if (filter) filter.addEventListener("input", () => filterRows(element.querySelector("#sites"), filter.value));
}

function cards() {
  const { manifest, timing, stages } = data, { average_bits: bits, memory_bytes: size, scheme } = manifest.summary || {};
  const card = (title, value, hint = "") => `<div class="card"><span>${title}</span><b>${value}</b><small>${hint}</small></div>`;
  const found = [], failed = stages.find((s) => s.info.failed);
  if (failed) found.push(card("failed", esc(failed.info.label), esc(failed.info.failed)));
  if (scheme) found.push(card("scheme", esc(scheme), `recipe ${esc(manifest.options.recipe)}`));
  if (bits) found.push(card("average bits", [bits.weights, bits.activations, bits.kv].map((b) => b.toFixed(2)).join(" / "), "weights / activations / KV cache"));
  if (size) found.push(card("size", megabytes(size.total), `codes ${megabytes(size.weight_codes)}, embeddings and head ${megabytes(size.embeddings + size.head)}`));
  const total = Object.values(timing).reduce((sum, s) => sum + s, 0), slowest = Object.entries(timing).sort((a, b) => b[1] - a[1])[0];
  if (slowest) found.push(card("passes", `${stages.length - 1} in ${secondsText(total)}`, `slowest: ${esc(slowest[0])}, ${secondsText(slowest[1])}`));
  const changes = stages.filter((s) => s.info.relative_error !== null), exact = changes.filter((s) => s.info.exact).map((s) => s.info.relative_error);
  if (exact.length) found.push(card("exact passes", `≤ ${errorText(Math.max(...exact))}`, "relative change of the logits, each pass"));
  const quantizers = changes.filter((s) => !s.info.exact);
  if (quantizers.length) found.push(card("quantizers", quantizers.map((s) => errorText(s.info.relative_error)).join(", "), "relative change of the logits, one after the other"));
  return found;
}

const notes = () => (data.manifest.notes.length ? `<ul class="notes">${data.manifest.notes.map((n) => `<li>${esc(n)}</li>`).join("")}</ul>` : "");

// Bars of the error attribution, where it was measured.
function costBars() {
  const tables = data.tables.filter((t) => t.columns.includes("KL") && t.rows.length);
  if (!tables.length) return "";
  const bars = ({ title, rows }) => {
    const most = Math.max(...rows.map((r) => r.KL)), shown = rows.slice(0, 8);
    return `<div class="bars"><h3>${esc(title.split(",")[0])}</h3>` + shown.map((r) => `<div class="bar"><span>${esc(r.name)}</span>` +
      `<i style="width:${(84 * r.KL) / most}px"></i><em>${number(r.KL, 2)} nats, ppl ${r["increase %"] > 0 ? "+" : ""}${number(r["increase %"], 3)} %</em></div>`).join("") +
      (rows.length > 8 ? `<button class="link" data-tab="diagnostics">all ${rows.length}</button>` : "") + "</div>";
  };
  return `<h2>What costs the accuracy</h2><div class="columns">${tables.map(bars).join("")}</div>`;
}

// Signal to noise of every site: a row for each kind of site, a column for each block.
function heatMap(sites) {
  if (!sites.length) return '<p class="hint">This dump has no noise figures: the compile failed, or the model was loaded without its calibration sample.</p>';
  const blocks = [...new Set(sites.map((s) => s.block))].filter((b) => b !== null).sort((a, b) => a - b);
  const rows = new Map();
  for (const site of sites) if (site.block !== null) rows.set(site.row, (rows.get(site.row) || new Map()).set(site.block, site));
  const cell = (site) => (site ? `<td style="background:${noiseColour(site.db)}" data-node="${esc(site.node || "")}" title="${esc(site.name)}: ${site.db} dB at ${site.bits} bits">${Math.round(site.db)}</td>` : "<td></td>");
  const body = [...rows].sort(([a], [b]) => a.localeCompare(b)).map(([row, found]) => `<tr><th>${esc(row)}</th><td class="bits">${[...found.values()][0].bits}</td>${blocks.map((b) => cell(found.get(b))).join("")}</tr>`);
  return `<h2>Signal to quantization noise, dB</h2><p class="hint">Every quantizer on the measured tokens, every weight by itself. A click shows the node. ` +
    `24 dB are four bits.</p><div class="wide"><table id="heat"><thead><tr><th>site</th><th class="bits">bits</th>${blocks.map((b) => `<th>${b}</th>`).join("")}</tr></thead><tbody>${body.join("")}</tbody></table></div>`;
}

function siteTable(sites) {
  if (!sites.length) return "";
  const kinds = new Map();
  for (const site of sites) kinds.set(site.row, [...(kinds.get(site.row) || []), site.db]);
  const middle = new Map([...kinds].map(([row, values]) => [row, median(values)]));
  const rows = [...sites].sort((a, b) => a.db - b.db).map((s) => `<tr><td><a data-node="${esc(s.node || "")}">${esc(s.name)}</a></td><td>${s.kind}</td><td class="number">${s.block ?? ""}</td>` +
    `<td class="number">${s.bits}</td><td class="number"><span class="swatch" style="background:${noiseColour(s.db)}"></span>${s.db.toFixed(2)}</td><td class="number">${(s.db - middle.get(s.row)).toFixed(2)}</td></tr>`);
  return `<h2>Sites, worst first</h2><p><input id="site-filter" type="search" placeholder="Filter: down_proj, kv, blocks.3 ..."> <span class="hint">A click on a heading sorts.</span></p>` +
    `<div class="tall"><table id="sites"><thead><tr><th>site</th><th>kind</th><th>block</th><th>bits</th><th>SQNR, dB</th><th>against its kind's median</th></tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

// ---- tables that sort by a click on a heading, and hide rows that lack the words ----
function sortable(table) {
  if (!table) return;
  table.tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th");
    if (!th) return;
    const column = th.cellIndex, down = th.dataset.order !== "up";
    for (const other of table.tHead.querySelectorAll("th")) delete other.dataset.order;
    th.dataset.order = down ? "up" : "down";
    const value = (row) => row.cells[column].textContent.trim(), sign = down ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stays last
      return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}

function filterRows(table, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of table.tBodies[0].rows) row.hidden = !words.every((w) => row.textContent.toLowerCase().includes(w));
}
