// One stage as a picture: folded by decoder block, laid out by dagre, drawn as SVG, with pan and zoom.
"use strict";

const CHAR = 6.7, ROW = 14, PAD = 9, HEAD = 26;
const COLOURS = { float: "#ffffff", 2: "#f4a89b", 3: "#f8c39a", 4: "#fbd38d", 8: "#a8cdf5", mixed: "#d9c2f0" };
const STATUS = { added: "#b7e4c0", removed: "#f5b5b0", changed: "#fde9a9", same: "#ffffff" };
const colourOf = (precision) => COLOURS[precision] || "#c9e7c9";
// Signal to noise as a colour: red is 5 dB, yellow 17, green 30, blue 45 and more.
const NOISE_STOPS = [[5, [214, 69, 65]], [11, [240, 140, 80]], [17, [250, 214, 122]], [30, [143, 201, 148]], [45, [120, 176, 222]]];
function noiseColour(db) {
  if (db === undefined || db === null) return "#ffffff";
  const i = Math.max(1, NOISE_STOPS.findIndex(([stop]) => db <= stop)), last = NOISE_STOPS[NOISE_STOPS.length - 1];
  if (db > last[0]) return `rgb(${last[1]})`;
  const [[low, from], [high, to]] = [NOISE_STOPS[i - 1], NOISE_STOPS[i]], t = Math.max(0, (db - low) / (high - low));
  return `rgb(${from.map((c, j) => Math.round(c + (to[j] - c) * t))})`;
}
const esc = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]));

function shapeText(record) {
  return record.values.map(([dtype, shape]) => `${dtype}[${shape.join(",")}]`).join(" ");
}

// One value is enough for a label: of a quantized activation its codes.
const shortShape = (record) => record.values.slice(0, 1).map(([dtype, shape]) => `${dtype}[${shape.join(",")}]`).join("");

function labelOf(record) {
  const last = record.module.split(".").pop(), where = !last || /^\d+$/.test(last) ? record.name : last;
  const part = record.facts.LinearPart ? ` part ${record.facts.LinearPart.index}` : "";
  const sign = record.facts.Projection ? ` ${record.facts.Projection.basis}${record.facts.Projection.inverse ? "⁻¹" : ""}` : "";
  const first = record.target + sign + (record.bits ? `  ${record.bits}` : "");
  const second = record.op === "call_function" ? `${where}${part}  ${shortShape(record)}` : shortShape(record);
  return [first, second.length > 44 ? second.slice(0, 43) + "…" : second];
}

function runLayout(nodes, edges) {
  const g = new dagre.graphlib.Graph().setGraph({ nodesep: 18, ranksep: 34, ...(nodes.length > 3000 ? { ranker: "longest-path" } : {}) });
  for (const node of nodes) g.setNode(node.v, node);
  for (const edge of edges) g.setEdge(edge.v, edge.w, edge);
  dagre.layout(g); // writes x and y into nodes, points into edges
  const points = edges.flatMap((e) => e.points || []);
  const least = points.reduce((x, p) => Math.min(x, p.x), 0); // long edges may pass left of all nodes
  for (const p of [...nodes, ...points]) p.x -= least;
  const right = nodes.reduce((x, n) => Math.max(x, n.x + n.width / 2), points.reduce((x, p) => Math.max(x, p.x), 0));
  return { width: right, height: nodes.reduce((y, n) => Math.max(y, n.y + n.height / 2), 0) };
}

const edgeBetween = (v, w, weight = 1) => ({ v, w, weight });

class GraphView {
  constructor(element, { onSelect, onToggle, onMove } = {}) {
    this.element = element;
    this.onMove = onMove || (() => {});
    this.noise = null; // record -> decibels, to colour by noise
    this.onSelect = onSelect || (() => {});
    this.onToggle = onToggle || (() => {});
    this.expanded = new Set();
    this.hits = new Set();
    this.tensors = false;
    this.inner = new Map();
    this.transform = { x: 20, y: 20, k: 1 };
    element.innerHTML = '<svg xmlns="http://www.w3.org/2000/svg"><defs><marker id="arrow-' + element.id + '" viewBox="0 0 10 10" refX="9" refY="5" ' +
      'markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L10 5L0 10z" fill="#8b99ab"/></marker></defs><g></g></svg>';
    this.svg = element.firstChild;
    this.root = this.svg.lastChild;
    this.listen();
  }

  // status: name -> added | removed | changed, or null to colour by precision
  show(stage, status = null) {
    this.stage = stage;
    this.status = status;
    this.draw();
  }

  toggle(block, notify = true) {
    if (!this.expanded.delete(block)) this.expanded.add(block);
    this.draw();
    if (notify) this.onToggle(block);
  }

  ownerOf(record) {
    return record.block !== null && !this.expanded.has(record.block) ? `block:${record.block}` : `node:${record.name}`;
  }

  visible(record) {
    return this.tensors || record.op !== "get_attr";
  }

  // Edges of the folded graph. Values that many blocks read (masks, rotary tables) are named inside the blocks instead.
  outerEdges() {
    const edges = new Map();
    for (const record of this.stage.nodes) {
      if (!this.visible(record)) continue;
      for (const name of record.inputs) {
        const source = this.stage.byName.get(name);
        if (!source || !this.visible(source)) continue;
        if (record.op === "output" && source.block !== null && name !== record.inputs[0]) continue;
        if (source.block !== record.block && this.stage.shared.has(name)) continue;
        const v = source.block === null ? `node:${name}` : `block:${source.block}`;
        const w = record.block === null ? `node:${record.name}` : `block:${record.block}`;
        if (v !== w) edges.set(`${v} ${w}`, edgeBetween(v, w, 2));
      }
    }
    return [...edges.values()];
  }

  draw() {
    const outer = new Map();
    for (const record of this.stage.nodes) {
      if (!this.visible(record)) continue;
      const id = record.block === null ? `node:${record.name}` : `block:${record.block}`;
      if (outer.has(id)) continue;
      if (record.block === null) outer.set(id, { v: id, record, ...this.sizeOf(record) });
      else outer.set(id, { v: id, block: record.block, ...this.blockSize(record.block) });
    }
    const nodes = [...outer.values()], edges = this.outerEdges();
    this.extent = runLayout(nodes, edges);
    this.places = new Map();
    const parts = [];
    for (const edge of edges) parts.push(this.edgeSvg(edge.points, edge.v, edge.w, 0, 0));
    for (const node of nodes) {
      const x = node.x - node.width / 2, y = node.y - node.height / 2;
      if (node.record) parts.push(this.nodeSvg(node.record, x, y, node.width, node.height));
      else if (this.expanded.has(node.block)) parts.push(this.expandedSvg(node.block, x, y, node.width, node.height));
      else parts.push(this.foldedSvg(node.block, x, y, node.width, node.height));
    }
    this.root.innerHTML = parts.join("");
    this.move();
    this.mark();
  }

  sizeOf(record) {
    const lines = labelOf(record);
    return { width: Math.max(...lines.map((l) => l.length)) * CHAR + 2 * PAD, height: lines.length * ROW + 2 * PAD - 4 };
  }

  blockSize(block) {
    if (!this.expanded.has(block)) return { width: 250, height: 50 };
    const { width, height } = this.innerLayout(block);
    return { width: width + 24, height: height + HEAD + 12 };
  }

  // Nodes of a block with a chip for every value from outside. Blocks of equal shape share one layout.
  innerLayout(block) {
    const members = (this.stage.blocks.get(block) || []).filter((r) => this.visible(r));
    const chips = new Map(), index = new Map(members.map((r, i) => [r.name, i])), edges = [];
    members.forEach((record, i) => {
      for (const name of record.inputs) {
        const source = this.stage.byName.get(name);
        if (!source || !this.visible(source)) continue;
        if (index.has(name)) edges.push([index.get(name), i]);
        else {
          if (!chips.has(name)) chips.set(name, members.length + chips.size);
          edges.push([chips.get(name), i]);
        }
      }
    });
    const sizes = [...members.map((r) => this.sizeOf(r)), ...[...chips.keys()].map((n) => ({ width: n.length * 6.2 + 16, height: 18 }))];
    const key = JSON.stringify([sizes.map((s) => Math.round(s.width)), edges]);
    if (!this.inner.has(key)) {
      const nodes = sizes.map((size, i) => ({ v: String(i), ...size }));
      const unique = [...new Map(edges.map(([a, b]) => [`${a} ${b}`, edgeBetween(String(a), String(b))])).values()];
      const size = runLayout(nodes, unique);
      this.inner.set(key, { nodes, edges: unique, ...size });
    }
    return { ...this.inner.get(key), members, chips: [...chips.keys()] };
  }

  expandedSvg(block, x, y, width, height) {
    const layout = this.innerLayout(block), parts = [];
    parts.push(`<g data-id="block:${block}"><rect class="box cluster" x="${x}" y="${y}" width="${width}" height="${height}" rx="10"/>` +
      `<text x="${x + 12}" y="${y + 17}">▾ block ${block}</text></g>`);
    const dx = x + 12, dy = y + HEAD;
    const nameOf = (i) => (i < layout.members.length ? layout.members[i].name : null);
    for (const edge of layout.edges)
      parts.push(this.edgeSvg(edge.points, `node:${nameOf(+edge.v)}`, `node:${nameOf(+edge.w)}`, dx, dy));
    layout.nodes.forEach((node, i) => {
      const left = dx + node.x - node.width / 2, top = dy + node.y - node.height / 2;
      if (i < layout.members.length) parts.push(this.nodeSvg(layout.members[i], left, top, node.width, node.height));
      else {
        const name = layout.chips[i - layout.members.length];
        parts.push(`<g data-id="node:${esc(name)}"><rect class="box chip" x="${left}" y="${top}" width="${node.width}" height="${node.height}" rx="9"/>` +
          `<text class="small" x="${left + 8}" y="${top + 13}">${esc(name)}</text></g>`);
      }
    });
    this.places.set(`block:${block}`, { x: x + width / 2, y: y + 14 });
    return parts.join("");
  }

  foldedSvg(block, x, y, width, height) {
    const members = this.stage.blocks.get(block).filter((r) => r.op === "call_function");
    const counts = new Map();
    let changes = 0;
    const loud = this.noise ? members.map(this.noise).filter((db) => db !== undefined).sort((a, b) => a - b) : [];
    for (const record of members) {
      const key = this.status ? this.status.get(record.name) || "same" : record.precision;
      counts.set(key, (counts.get(key) || 0) + 1);
      if (key !== "same") changes += 1;
    }
    this.places.set(`block:${block}`, { x: x + width / 2, y: y + height / 2 });
    let at = x + 10, bar = "";
    const pieces = loud.length && !this.status ? loud.map((db) => [noiseColour(db), 1]) :
      [...counts].sort().map(([key, count]) => [this.status ? STATUS[key] : colourOf(key), count]);
    const unit = (width - 20) / pieces.reduce((sum, [, count]) => sum + count, 0);
    for (const [fill, count] of pieces) {
      bar += `<rect x="${at}" y="${y + 32}" width="${unit * count}" height="9" fill="${fill}" stroke="#9aa7b6" stroke-width=".6"/>`;
      at += unit * count;
    }
    const info = this.status ? (changes ? `${changes} changed` : "equal") : loud.length ? `lowest ${loud[0].toFixed(1)} dB` : `${members.length} operators`;
    return `<g data-id="block:${block}"><rect class="box" x="${x}" y="${y}" width="${width}" height="${height}" rx="10" fill="#fff"/>` +
      `<text x="${x + 12}" y="${y + 20}">▸ block ${block}</text><text class="small" text-anchor="end" x="${x + width - 12}" y="${y + 20}">${info}</text>${bar}</g>`;
  }

  nodeSvg(record, x, y, width, height) {
    const [first, second] = labelOf(record);
    const fill = this.status ? STATUS[this.status.get(record.name) || "same"] : this.noise ? noiseColour(this.noise(record)) : colourOf(record.precision);
    const failed = this.stage.info.failed_node === record.name ? " failed" : "";
    const made = !this.status && record.pass === this.stage.info.name && this.stage.index > 0 ? "new-here" : "";
    this.places.set(`node:${record.name}`, { x: x + width / 2, y: y + height / 2 });
    const rounding = record.op === "call_function" ? 5 : height / 2;
    return `<g data-id="node:${esc(record.name)}" class="${made}${failed}"><rect class="box" x="${x}" y="${y}" width="${width}" height="${height}" rx="${rounding}" fill="${fill}"/>` +
      `<rect class="mark" x="${x}" y="${y + 4}" width="4" height="${height - 8}" rx="2"/>` +
      `<text x="${x + PAD}" y="${y + PAD + 8}">${esc(first)}</text><text class="small" x="${x + PAD}" y="${y + PAD + 8 + ROW}">${esc(second)}</text></g>`;
  }

  edgeSvg(points, v, w, dx, dy) {
    const p = points.map(({ x, y }) => [x + dx, y + dy]);
    let d = `M${p[0]}`;
    for (let i = 1; i < p.length - 1; i++) d += `Q${p[i]} ${(p[i][0] + p[i + 1][0]) / 2},${(p[i][1] + p[i + 1][1]) / 2}`;
    d += `L${p[p.length - 1]}`;
    return `<path class="edge" data-v="${esc(v)}" data-w="${esc(w)}" d="${d}" marker-end="url(#arrow-${this.element.id})"/>`;
  }

  // ---- selection and search ----
  select(name) {
    this.selected = name;
    this.mark();
  }

  mark() {
    const folded = new Map();
    for (const name of this.hits) {
      const record = this.stage.byName.get(name);
      if (record) folded.set(this.ownerOf(record), true);
    }
    const own = this.selected && this.stage.byName.get(this.selected);
    const id = own ? this.ownerOf(own) : null;
    for (const g of this.root.querySelectorAll("g[data-id]")) {
      g.classList.toggle("hit", folded.has(g.dataset.id));
      g.classList.toggle("selected", g.dataset.id === id);
    }
    for (const path of this.root.querySelectorAll("path.edge"))
      path.classList.toggle("touched", id !== null && (path.dataset.v === id || path.dataset.w === id));
  }

  reveal(name, zoom = true) {
    const record = this.stage.byName.get(name);
    if (!record) return;
    if (record.block !== null && !this.expanded.has(record.block)) this.toggle(record.block);
    if (!this.visible(record)) { this.tensors = true; this.draw(); }
    this.select(name);
    this.centre(`node:${name}`, zoom ? Math.max(this.transform.k, 0.9) : this.transform.k);
  }

  centre(id, k = this.transform.k) {
    const place = this.places.get(id);
    if (!place) return;
    const { clientWidth, clientHeight } = this.element;
    this.transform = { k, x: clientWidth / 2 - place.x * k, y: clientHeight / 2 - place.y * k };
    this.move();
  }

  // ---- pan and zoom ----
  move(notify = true) {
    const { x, y, k } = this.transform;
    this.root.setAttribute("transform", `translate(${x},${y}) scale(${k})`);
    if (notify) this.onMove(this);
  }

  // Look where another view looks: the node nearest to its middle that both have stands at the same place of the screen.
  followView(other) {
    const { clientWidth, clientHeight } = other.element, { x, y, k } = other.transform;
    const middle = { x: (clientWidth / 2 - x) / k, y: (clientHeight / 2 - y) / k };
    let anchor = null, least = Infinity;
    for (const [id, place] of other.places) {
      const distance = Math.hypot(place.x - middle.x, place.y - middle.y);
      if (distance < least && this.places.has(id)) [anchor, least] = [id, distance];
    }
    const here = this.places.get(anchor), there = other.places.get(anchor);
    this.transform = here ? { k, x: x + (there.x - here.x) * k, y: y + (there.y - here.y) * k } : { k, x, y };
    this.move(false);
  }

  fit(whole = true) {
    const { clientWidth, clientHeight } = this.element;
    const { width, height } = this.extent;
    const wide = (clientWidth - 40) / width;
    const k = Math.min(whole ? Math.min(wide, (clientHeight - 40) / height) : wide, 1);
    this.transform = { k, x: (clientWidth - width * k) / 2, y: 20 };
    this.move();
  }

  zoom(factor, x = this.element.clientWidth / 2, y = this.element.clientHeight / 2) {
    const t = this.transform, k = Math.min(4, Math.max(0.02, t.k * factor)), ratio = k / t.k;
    this.transform = { k, x: x - (x - t.x) * ratio, y: y - (y - t.y) * ratio };
    this.move();
  }

  listen() {
    let drag = null, moved = false;
    this.element.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = this.element.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * 0.0016), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    this.element.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX - this.transform.x, y: event.clientY - this.transform.y, from: [event.clientX, event.clientY] };
      moved = false;
    });
    window.addEventListener("pointermove", (event) => {
      if (!drag) return;
      if (Math.hypot(event.clientX - drag.from[0], event.clientY - drag.from[1]) > 4) moved = true;
      if (!moved) return;
      this.element.classList.add("dragging");
      this.transform = { ...this.transform, x: event.clientX - drag.x, y: event.clientY - drag.y };
      this.move();
    });
    window.addEventListener("pointerup", () => { drag = null; this.element.classList.remove("dragging"); });
    this.element.addEventListener("click", (event) => {
      const g = event.target.closest("g[data-id]");
      if (moved || !g) return;
      const [kind, name] = [g.dataset.id.slice(0, g.dataset.id.indexOf(":")), g.dataset.id.slice(g.dataset.id.indexOf(":") + 1)];
      if (kind === "block") this.toggle(Number(name));
      else { this.select(name); this.onSelect(name, this); }
    });
  }
}
