// Two stages side by side: nodes coloured by what happened to them, and a list of the differences.
"use strict";

const MAX_LINES = 2000;
let left, right, pair = null;

function setUpCompare() {
  const options = data.stages.map((s, i) => `<option value="${i}">${esc(s.info.label)}</option>`).join("");
  $("left-stage").innerHTML = $("right-stage").innerHTML = options;
  const views = [["left", (name) => follow(left, name)], ["right", (name) => follow(right, name)]].map(([id, onSelect]) =>
    new GraphView($(id), {
      onSelect, onToggle: (block) => (id === "left" ? right : left).toggle(block, false),
      onMove: (view) => $("linked").checked && right.places && left.places && (view === left ? right : left).followView(view),
    }));
  [left, right] = views;
  $("before-change").addEventListener("click", () => stepChange(-1));
  $("next-change").addEventListener("click", () => stepChange(1));
  for (const id of ["left-stage", "right-stage"]) $(id).addEventListener("change", () => { pair = null; drawCompare(); });
  $("left-stage").value = Math.max(0, current - 1);
  $("right-stage").value = current;
  $("expand-changed").addEventListener("click", expandChanged);
  $("collapse-both").addEventListener("click", () => { for (const v of [left, right]) { v.expanded.clear(); v.draw(); } right.fit(false); });
}

// A click on a pass while comparing: compare it with the one before it.
function compareWith(index) {
  $("left-stage").value = Math.max(0, index - 1);
  $("right-stage").value = index;
  pair = null;
  drawCompare();
}

function drawCompare() {
  const a = data.stage(Number($("left-stage").value)), b = data.stage(Number($("right-stage").value));
  const key = `${a.index} ${b.index}`;
  if (pair === key) return;
  pair = key;
  const status = difference(a, b), count = (kind) => [...status.values()].filter((s) => s === kind).length;
  $("difference").textContent = `${count("added")} added, ${count("removed")} removed, ${count("changed")} changed`;
  left.show(a, status);
  right.show(b, status);
  right.fit(false);
  listChanges(a, b, status);
}

// The next or previous changed node, in the order of the graph, from the one that is selected.
function stepChange(step) {
  const names = [...new Set([...$("changes").querySelectorAll("[data-name]")].map((line) => line.dataset.name))];
  if (!names.length) return;
  const at = names.indexOf($("changes").dataset.at), next = (at + step + names.length) % names.length;
  goToChange(names[at < 0 && step < 0 ? names.length - 1 : next]);
}

function goToChange(name) {
  $("changes").dataset.at = name;
  for (const line of $("changes").querySelectorAll("[data-name]")) line.classList.toggle("at", line.dataset.name === name);
  $("changes").querySelector(".at").scrollIntoView({ block: "nearest" });
  for (const view of [left, right]) view.reveal(name);
  show(name);
}

// Two versions of a line with what differs in bold: everything between the common beginning and the common end.
function boldDifference(before, after) {
  let start = 0, end = 0;
  while (start < Math.min(before.length, after.length) && before[start] === after[start]) start++;
  while (end < Math.min(before.length, after.length) - start && before[before.length - 1 - end] === after[after.length - 1 - end]) end++;
  return [before, after].map((t) => `${esc(t.slice(0, start))}<b>${esc(t.slice(start, t.length - end))}</b>${esc(t.slice(t.length - end))}`);
}

function listChanges(a, b, status) {
  const lines = [];
  for (const [name, kind] of status) {
    const before = a.byName.get(name), after = b.byName.get(name);
    const line = (r) => `%${r.name}: ${shapeText(r)} = ${r.text}`;
    if (kind !== "changed") lines.push([name, kind, esc(`${kind === "added" ? "+" : "−"} ${line(after || before)}`)]);
    else if (before.text === after.text) lines.push([name, kind, `~ ${esc(line(after))}   <b>${esc(otherFields(before, after))}</b>`]);
    else {
      const [old, now] = boldDifference(line(before), line(after));
      lines.push([name, kind, `− ${old}`], [name, kind, `+ ${now}`]);
    }
  }
  const shown = lines.slice(0, MAX_LINES);
  $("changes").innerHTML = shown.map(([name, kind, text]) => `<div class="${kind}" data-name="${esc(name)}">${text}</div>`).join("") +
    (lines.length > MAX_LINES ? `<p class="hint">${lines.length - MAX_LINES} more lines; compare the .txt files with diff to see all</p>` : "") +
    (lines.length ? "" : '<p class="hint">These two stages are equal.</p>');
  $("changes").onclick = (event) => {
    const line = event.target.closest("[data-name]");
    if (line) goToChange(line.dataset.name);
  };
  delete $("changes").dataset.at;
}

function otherFields(before, after) {
  return FIELDS.filter((f) => JSON.stringify(before[f]) !== JSON.stringify(after[f])).map((f) =>
    f === "facts" ? Object.keys(after.facts).join(", ") || "facts" : f === "values" ? `${shapeText(before)} before` : `${f}: ${JSON.stringify(before[f])} before`).join("; ");
}

function show(name) {
  details(right.stage.byName.has(name) ? right.stage : left.stage, name);
}

function follow(view, name) {
  const other = view === left ? right : left;
  if (other.stage.byName.has(name)) other.reveal(name, false);
  else { other.selected = null; other.mark(); }
  details(view.stage, name);
}

function expandChanged() {
  for (const view of [left, right]) {
    view.expanded = new Set([...view.stage.blocks].filter(([, members]) => members.some((r) => view.status.has(r.name))).map(([b]) => b));
    view.draw();
  }
  right.fit(false);
}
