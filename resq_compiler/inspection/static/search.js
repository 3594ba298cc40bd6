// Search, and what the keyboard does.
"use strict";

const KEYS = [["/", "find nodes"], ["Enter", "next found, Shift: previous"], ["Esc", "clear"], ["[ ]", "previous, next pass"],
  ["n p", "next, previous change (Compare)"], ["e", "expand all"], ["c", "fold all"], ["f", "fit"], ["+ −", "zoom"], ["1 … 6", "tabs"]];
let nextHit = -1;

// Every word must occur in the node's name, operator, module, bits, pass or facts.
function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const stage = data.stage(current);
  const hits = words.length ? stage.nodes.filter((record) => {
    const text = `${record.name} ${record.target} ${record.module} ${record.bits} ${record.pass} ${JSON.stringify(record.facts)}`.toLowerCase();
    return words.every((w) => text.includes(w));
  }).sort((a, b) => (a.op === "get_attr") - (b.op === "get_attr")) : [];
  graph.hits = new Set(hits.map((r) => r.name));
  graph.mark();
  const at = hits.length && nextHit >= 0 ? `${(nextHit % hits.length) + 1} of ` : "";
  $("hits").textContent = words.length ? `${at}${hits.length} found${hits.length && nextHit < 0 ? " (Enter: next)" : ""}` : "";
  return hits;
}

function goToHit(step) {
  const hits = search($("search").value);
  if (!hits.length) return;
  nextHit = (nextHit + step + (nextHit < 0 && step < 0 ? 1 : 0) + hits.length) % hits.length;
  reveal(current, hits[nextHit].name);
  search($("search").value);
}

function setUpKeyboard() {
  $("search").addEventListener("input", () => { nextHit = -1; search($("search").value); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === $("search") && event.key === "Enter") return goToHit(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") return clearSearch();
    if (event.target.matches("input[type=search], select")) return;
    const act = actions()[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  $("keys").innerHTML = KEYS.map(([key, what]) => `<dt><kbd>${key}</kbd></dt><dd>${what}</dd>`).join("");
}

function clearSearch() {
  $("search").value = "";
  $("search").blur();
  nextHit = -1;
  search("");
  graph.select(null);
  overview(data.stage(current));
}

function actions() {
  const comparing = $("compare").classList.contains("on"), views = comparing ? [left, right] : [graph];
  const tabs = Object.fromEntries([...document.querySelectorAll("#tabs button")].map((b, i) => [String(i + 1), () => showTab(b.dataset.tab)]));
  const stage = (step) => () => {
    const index = Math.min(data.stages.length - 1, Math.max(0, (comparing ? Number($("right-stage").value) : current) + step));
    return comparing ? compareWith(index) : showStage(index);
  };
  return {
    ...tabs, "/": () => { showTab("graph"); $("search").focus(); $("search").select(); }, "[": stage(-1), "]": stage(1),
    n: () => comparing && stepChange(1), p: () => comparing && stepChange(-1),
    e: () => (comparing ? expandChanged() : expandAll()), c: () => (comparing ? $("collapse-both").click() : $("collapse").click()),
    f: () => views.at(-1).fit(), "+": () => views.at(-1).zoom(1.3), "-": () => views.at(-1).zoom(0.77),
  };
}
