"""Records as text and as Graphviz."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

COLOURS = {"float": "#eef1f5", "2": "#f6b2a8", "3": "#f8c39a", "4": "#fbd38d", "8": "#a8cdf5", "mixed": "#d9c2f0"}
OTHER_BITS = "#c9e7c9"
Record = dict[str, Any]


def shape_text(record: Record) -> str:
    """All tensors of a value, such as float32[2, 5, 576]."""
    return " ".join(f"{dtype}[{', '.join(map(str, shape))}]" for dtype, shape in record["values"]) or "?"


def node_line(record: Record) -> str:
    """A node in one line: name, shape, call, then bits, module, pass and facts."""
    where = [record["module"] or "-", record["pass"]]
    if record["bits"]:
        where.insert(0, record["bits"] if record["bits"].startswith("W") else f"{record['bits']}-bit")
    where += [f"{kind}({_fields(fields)})" for kind, fields in record["facts"].items()]
    call = "return " + ", ".join("%" + n for n in record["inputs"]) if record["op"] == "output" else record["text"]
    left = call if record["op"] == "output" else f"%{record['name']}: {shape_text(record)} = {call}"
    return f"{left}  # {'; '.join(where)}"


def _fields(fields: Any) -> str:
    if not isinstance(fields, dict):
        return str(fields)
    return ", ".join(f"{k}={_fields(v) if not isinstance(v, dict) else v.get('name', v)}" for k, v in fields.items())


def graph_text(header: Iterable[str], records: list[Record], failed_node: str | None = None) -> str:
    """A stage as text: a header, then nodes in order under headings of their decoder block."""
    return "\n".join([*(f"# {line}" for line in header), *_lines(records, failed_node)]) + "\n"


def _lines(records: list[Record], failed_node: str | None) -> Iterator[str]:
    """Inputs, then operators under headings of their block, then tensors."""
    current: Any = "start"
    for kinds, title in (
        (("placeholder",), "inputs"),
        (("call_function", "call_module", "output"), ""),
        (("get_attr",), "tensors"),
    ):
        if title:
            yield from ("", f"# {title}")
        for record in records:
            if record["op"] not in kinds:
                continue
            if not title and record["block"] != current:
                current = record["block"]
                yield from ("", "# outside the decoder blocks" if current is None else f"# block {current}")
            yield (">>> FAILED HERE >>> " if record["name"] == failed_node else "") + node_line(record)


def graph_dot(name: str, records: list[Record], failed_node: str | None = None) -> str:
    """A stage as Graphviz: one cluster for each decoder block, tensors left out, coloured by precision."""
    shown = [r for r in records if r["op"] != "get_attr"]
    names = {r["name"] for r in shown}
    lines = [
        f"digraph {_quote(name)} {{",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];',
    ]
    blocks: dict[int, list[Record]] = {}
    for record in shown:
        if record["block"] is None:
            lines.append("  " + _dot_node(record, failed_node))
        else:
            blocks.setdefault(record["block"], []).append(record)
    for block, members in sorted(blocks.items()):
        lines += [f"  subgraph cluster_{block} {{", f'    label="block {block}"; color="#b6c0cc";']
        lines += ["    " + _dot_node(record, failed_node) for record in members]
        lines.append("  }")
    lines += [f"  {_quote(s)} -> {_quote(r['name'])};" for r in shown for s in r["inputs"] if s in names]
    return "\n".join([*lines, "}"]) + "\n"


def _dot_node(record: Record, failed_node: str | None) -> str:
    label = f"{record['target']}\\n{record['name']}\\n{shape_text(record)}"
    colour = COLOURS.get(record["precision"], OTHER_BITS)
    if record["bits"]:
        label += f"\\n{record['bits']}"
    border = ', color="red", penwidth=3' if record["name"] == failed_node else ""
    return f'{_quote(record["name"])} [label="{label}", fillcolor="{colour}"{border}];'


def _quote(name: str) -> str:
    escaped = name.replace('"', '\\"')
    return f'"{escaped}"'
