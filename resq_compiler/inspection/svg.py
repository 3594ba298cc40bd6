"""A stage as a static picture: SVG, laid out and drawn by the package graphlay.

Decoder blocks that look alike are drawn once: the first of a kind is open, the ones after it are one folded box. A value that
many blocks read (masks, rotary tables) is a small label inside the blocks, so that no edges run across the picture.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resq_compiler.errors import DumpError
from resq_compiler.inspection.records import SHARED
from resq_compiler.inspection.text import COLOURS, OTHER_BITS, Record, shape_text

HOW_TO_INSTALL = "pictures of graphs need the package graphlay: pip install 'resq_compiler[inspect]'"
CHAR, LINE, MARGIN = (
    6.7,
    14.0,
    8.0,
)  # pixels: width of a letter of the font below, height of a line, space around the text
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
INK, SOFT, EDGE, FRAME, FAILED = "#1d2733", "#53647a", "#8b99ab", "#b6c0cc", "#d00000"
LAYOUT = {
    "direction": "topbottom",
    "spacing": {"layer_gap": 30, "node_gap": 22, "dummy_gap": 14, "compound_header": 22, "compound_padding": 14},
}


@dataclass(frozen=True)
class Box:
    """One rectangle: id, lines of text, colour, and the id of the frame it stands in."""

    id: str
    lines: tuple[str, ...]
    fill: str
    parent: str | None = None
    kind: str = "node"  # node, label, folded, frame
    failed: bool = False


def library_available() -> bool:
    """True where the package that draws is installed."""
    return importlib.util.find_spec("graphlay") is not None


def graph_svg(records: list[Record], failed_node: str | None = None) -> str:
    """A stage as SVG text; equal records give equal text. Raises DumpError: graphlay is missing, or cannot draw this graph."""
    if not library_available():
        raise DumpError(HOW_TO_INSTALL)
    import graphlay

    shown = [r for r in records if r["op"] != "get_attr"]
    picture = _Picture(shown, failed_node)
    graph = graphlay.Graph()
    for box in picture.boxes.values():
        width = max(map(len, box.lines)) * CHAR + 2 * MARGIN
        parent = {} if box.parent is None else {"parent": graph._resolve(box.parent)}
        graph.node(box.id, width=width, height=len(box.lines) * LINE + 2 * MARGIN - 6, **parent)
    for source, target in picture.edges:
        graph.edge(source, target)
    try:
        scene = graphlay.layout(graph, options=LAYOUT).sketch_scene()
    except graphlay.GraphlayError as error:
        raise DumpError(
            f"graph of {len(shown)} nodes: graphlay cannot draw it ({error}); the .dot and .txt files have every node"
        ) from error
    for node in scene["nodes"]:
        _dress(node, picture.boxes[node["content"][0]["text"]])
    for edge in scene["edges"]:
        edge["stroke"] |= {"paint": EDGE, "width": 1.2}
    scene["font"] |= {"family": FONT, "size": 11.0}
    return str(graphlay.render_scene(scene)).rstrip() + "\n"


def _dress(node: dict[str, Any], box: Box) -> None:
    """Give a box of the scene its colours and its lines of text."""
    text = node["content"][0]
    node["fill"] = box.fill
    node["stroke"] |= (
        {"paint": FAILED, "width": 4.0}
        if box.failed
        else {"paint": FRAME if box.kind == "frame" else EDGE, "width": 1.0}
    )
    if box.kind == "frame":
        node["stroke"]["dash"] = "5,4"
    top = -node["rect"]["h"] / 2 + 13 if box.kind == "frame" else -(len(box.lines) - 1) * LINE / 2
    node["content"] = [
        {**text, "text": line, "dy": top + i * LINE, "size": 11.0 if i == 0 else 10.0, "wrap": None, "family": FONT,
         "weight": 600.0 if i == 0 and box.kind in ("node", "frame") else 400.0, "color": INK if i == 0 else SOFT}
        for i, line in enumerate(box.lines)
    ]  # fmt: skip


class _Picture:
    """Boxes and edges of the folded graph."""

    def __init__(self, records: list[Record], failed_node: str | None):
        self.records = {r["name"]: r for r in records}
        self.failed_node = failed_node
        self.blocks: dict[int, list[Record]] = {}
        for record in records:
            if record["block"] is not None:
                self.blocks.setdefault(record["block"], []).append(record)
        self.shared = self._shared()
        self.owner: dict[int, str] = {}  # a folded block -> the box that stands for it
        self.boxes: dict[str, Box] = {}
        self._make_boxes(records)
        self.edges = list(dict.fromkeys(self._edges(records)))

    def _shared(self) -> set[str]:
        readers: dict[str, set[int]] = {}
        for block, members in self.blocks.items():
            for record in members:
                for name in record["inputs"]:
                    if name in self.records and self.records[name]["block"] != block:
                        readers.setdefault(name, set()).add(block)
        return {name for name, blocks in readers.items() if len(blocks) >= SHARED}

    def _make_boxes(self, records: list[Record]) -> None:
        opened: dict[str, int] = {}
        for run in self._runs():
            first = run[0]
            opened.setdefault(self._kind(first), first)
            if opened[self._kind(first)] == first or self._has_failed(first):
                self._open(first)
                run = run[1:]
            if run:
                self._fold(run, opened[self._kind(first)])
        for record in records:
            if record["block"] is None:
                self._add(self._node(record))

    def _runs(self) -> Iterator[list[int]]:
        """Neighbouring blocks that look alike."""
        run: list[int] = []
        for block in sorted(self.blocks):
            if run and (self._kind(block) != self._kind(run[0]) or self._has_failed(block)):
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    def _kind(self, block: int) -> str:
        """Equal for blocks with the same operators, shapes, bits and edges inside."""
        members = self.blocks[block]
        place = {r["name"]: i for i, r in enumerate(members)}
        operators = [
            [r["target"] if r["op"] == "call_function" else "", r["bits"], r["values"], [place.get(n) for n in r["inputs"]]]
            for r in members
        ]  # fmt: skip
        return json.dumps(operators)

    def _has_failed(self, block: int) -> bool:
        return any(r["name"] == self.failed_node for r in self.blocks[block])

    def _open(self, block: int) -> None:
        frame = self._add(Box(f"block {block}", (f"block {block}",), "none", kind="frame"))
        for record in self.blocks[block]:
            self._add(self._node(record, frame))
        for name in dict.fromkeys(n for r in self.blocks[block] for n in r["inputs"] if self._is_label(n, r)):
            self._add(Box(f"block {block}: {name}", (name,), "#e8edf3", frame, "label"))

    def _fold(self, blocks: list[int], like: int) -> None:
        title = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"
        operators = sum(r["op"] == "call_function" for r in self.blocks[blocks[0]])
        each = "" if len(blocks) == 1 else "each "
        box = self._add(
            Box(f"fold {blocks[0]}", (title, f"{each}as block {like}: {operators} operators"), "#ffffff", kind="folded")
        )
        self.owner |= dict.fromkeys(blocks, box)

    def _add(self, box: Box) -> str:
        self.boxes[box.id] = box
        return box.id

    def _node(self, record: Record, frame: str | None = None) -> Box:
        return Box(
            f"node {record['name']}", node_lines(record), COLOURS.get(record["precision"], OTHER_BITS), frame,
            failed=record["name"] == self.failed_node,
        )  # fmt: skip

    def _edges(self, records: list[Record]) -> Iterator[tuple[str, str]]:
        for record in records:
            target = self._box_of(record)
            for name in record["inputs"]:
                source = self.records.get(name)
                if source is None:
                    continue
                start = self._box_of(source)
                if self._is_label(name, record):
                    start = f"block {record['block']}: {name}"
                    if start not in self.boxes:
                        continue  # a folded block
                if record["op"] == "output" and source["block"] is not None and name != record["inputs"][0]:
                    continue  # new keys and values of every block
                if start != target:
                    yield start, target

    def _is_label(self, name: str, reader: Record) -> bool:
        """True where a value is drawn as a label beside its reader."""
        return name in self.shared and reader["block"] not in (None, self.records[name]["block"])

    def _box_of(self, record: Record) -> str:
        return self.owner.get(record["block"]) or f"node {record['name']}"


def node_lines(record: Record) -> tuple[str, ...]:
    """What stands in the box of a node: operator and bits, then module and shape."""
    facts = record["facts"]
    projection, part = facts.get("Projection"), facts.get("LinearPart")
    sign = f" {projection['basis']}{'⁻¹' if projection['inverse'] else ''}" if projection else ""
    last = record["module"].rpartition(".")[2]
    where = record["name"] if last.isdigit() or not last else last  # a number is the block's own, as for residual sums
    if record["op"] != "call_function":
        return (record["target"], shape_text(record))
    first = record["target"] + sign + (f"  {record['bits']}" if record["bits"] else "")
    suffix = f" part {part['index']}" if part else ""
    return (first, f"{where}{suffix}  {shape_text(record)}")
