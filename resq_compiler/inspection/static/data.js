// The data of the page: unpacked once, with each stage's nodes looked up by name and by decoder block.
"use strict";

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Stages share a pool of node records: nodes that a pass left alone are stored once.
class Stage {
  constructor(info, members, index) {
    this.info = info;
    this.members = members;
    this.index = index;
  }

  prepare(pool) {
    if (this.nodes) return this;
    this.nodes = this.members.map((i) => pool[i]);
    this.byName = new Map(this.nodes.map((r) => [r.name, r]));
    this.position = new Map(this.nodes.map((r, i) => [r.name, this.members[i]]));
    this.blocks = new Map();
    this.users = new Map();
    const readers = new Map();
    for (const record of this.nodes) {
      if (record.block !== null) {
        if (!this.blocks.has(record.block)) this.blocks.set(record.block, []);
        this.blocks.get(record.block).push(record);
      }
      for (const name of record.inputs) {
        if (!this.users.has(name)) this.users.set(name, []);
        this.users.get(name).push(record.name);
        if (record.block === null) continue;
        if (!readers.has(name)) readers.set(name, new Set());
        readers.get(name).add(record.block);
      }
    }
    // a value from outside that three blocks or more read: a mask or a table, not the residual stream
    this.shared = new Set([...readers].filter(([name, blocks]) => blocks.size > 2).map(([name]) => name));
    return this;
  }
}

const FIELDS = ["name", "op", "target", "text", "inputs", "values", "module", "pass", "block", "bits", "precision", "facts"];

function readData(raw) {
  const pool = raw.pool.map((values) => Object.fromEntries(FIELDS.map((f, i) => [f, values[i]])));
  const stages = raw.stages.map((s, i) => new Stage(s.info, s.nodes, i));
  return { ...raw, pool, stages, stage: (i) => stages[i].prepare(pool) };
}

// What happened to nodes between two stages: name -> added, removed or changed.
function difference(left, right) {
  const status = new Map();
  for (const record of left.nodes) {
    if (!right.byName.has(record.name)) status.set(record.name, "removed");
    else if (left.position.get(record.name) !== right.position.get(record.name)) status.set(record.name, "changed");
  }
  for (const record of right.nodes) if (!left.byName.has(record.name)) status.set(record.name, "added");
  return status;
}

// Original linears and the nodes of their parts in a stage: name -> {site, parts: [{part, record}]}.
function linearsOf(stage) {
  const found = new Map();
  for (const record of stage.nodes) {
    const part = record.facts.LinearPart, site = record.facts.LinearSite || (part && part.site);
    if (!site) continue;
    if (!found.has(site.name)) found.set(site.name, { site, parts: [] });
    found.get(site.name).parts.push({ part, record });
  }
  return found;
}

// Decibels of what a node rounds: a quantizer its values, a linear's part its weights; undefined where nothing is rounded.
function noiseOf(data, record) {
  const { LinearPart: part, QuantizerSite: site } = record.facts, noise = data.manifest.noise;
  const entry = site ? noise[site.name] : part && noise[`${part.site.name}.part${part.index}`];
  return entry && entry.sqnr_db;
}

// Every site of the noise table: {name, kind, block, bits, db, row, node}; row: the name without its block; node: what rounds there.
function noiseSites(data, stage) {
  const nodes = new Map();
  for (const record of stage.nodes) {
    const { LinearPart: part, QuantizerSite: site } = record.facts;
    if (part) nodes.set(`${part.site.name}.part${part.index}`, record.name);
    if (site) nodes.set(site.name, record.name);
  }
  return Object.entries(data.manifest.noise).map(([name, entry]) => {
    const words = name.split("."), at = words.indexOf(String(entry.block));
    const short = at < 0 ? name : words.slice(at + 1).join(".");
    return { name, kind: entry.kind, block: entry.block, bits: entry.bits, db: entry.sqnr_db, node: nodes.get(name), row: `${entry.kind}: ${short}` };
  });
}

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};

function noiseOfPart(data, stage, record) {
  const part = record.facts.LinearPart;
  const weight = part && data.manifest.noise[`${part.site.name}.part${part.index}`];
  const quantizer = stage.byName.get(record.inputs[0]);
  const site = quantizer && quantizer.facts.QuantizerSite;
  return { weight: weight && weight.sqnr_db, input: site && data.manifest.noise[site.name] && data.manifest.noise[site.name].sqnr_db };
}
