"""Nodes of the domain `resq` that follow each other become one node, a chain: ONNX Runtime touches its objects at every node, and the
weights of a step of generation have swept them out of the caches. kernels/src/onnx_chain.c computes it and says how it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper
from resq_compiler.backends.onnx.builder import bodies

DOMAIN, CHAIN = "resq", "Chain"
LONGEST_NAME = 255  # characters that the kernels keep of a step's name
_CODES = (TensorProto.INT8, TensorProto.INT8, TensorProto.FLOAT, TensorProto.INT32)
_CACHED = (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.UINT8)
OUTPUTS: dict[str, tuple[int, ...]] = {
    "NormQuantize": _CODES,
    "HadamardQuantize": _CODES,
    "AttentionQuantize": _CODES,
    "MixedLinear": _CACHED[:1],
    "NormLinear": _CACHED[:1],
    "HadamardLinear": _CACHED[:1],
    "AttentionLinear": _CACHED,
    "RopeCache": _CACHED,
    "CacheImage": _CACHED[:2],
    "LatentAttention": _CACHED,
    "Attention": _CACHED[:1],
    "Experts": _CACHED[:1],
    "Rows": _CACHED[:1],
    "Embed": _CACHED[:1],
    "Angles": _CACHED[:1],
    "Keep": _CACHED[:1],
    "Seen": (TensorProto.BOOL,),
}
"""Operators that can be steps, and the types of their outputs."""


@dataclass
class Run:
    """Steps that follow each other, nodes that wait behind them as they read what steps make, and the outputs of both."""

    steps: list[onnx.NodeProto] = field(default_factory=list)
    behind: list[onnx.NodeProto] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    made_behind: set[str] = field(default_factory=set)

    def takes(self, node: onnx.NodeProto) -> bool:
        """Adds a node if it can stand in this run or behind it and not before."""
        reads = read_by(node)
        if is_step(node) and not reads & self.made_behind:
            self.steps.append(node)
            self.made.update(node.output)
            return True
        if is_step(node) or not reads & (self.made | self.made_behind):
            return False
        self.behind.append(node)
        self.made_behind.update(node.output)
        return True


def is_step(node: onnx.NodeProto) -> bool:
    """Whether a node can be a step of a chain."""
    return node.domain == DOMAIN and node.op_type in OUTPUTS


def read_by(node: onnx.NodeProto) -> set[str]:
    """The values that a node or a graph inside it reads."""
    return {*node.input, *(name for body in bodies(node) for inner in body.node for name in inner.input)} - {""}


def chained(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]
) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """The nodes with every run of steps as one node, and the types of what these make, which ONNX Runtime cannot find itself.

    A node between two steps goes before them where it reads nothing of theirs, else behind them. outputs: of the graph.
    """
    wanted, left = set(outputs), list(nodes)
    found: list[onnx.NodeProto] = []
    types: list[onnx.ValueInfoProto] = []
    while left:
        run, before, rest = _first_run(left)
        read = wanted.union(*map(read_by, run.behind), *map(read_by, rest))
        made = [name for step in run.steps for name in step.output if name in read]
        found += before
        if len(run.steps) > 1:
            found.append(chain(run.steps, made))
            types += _types(run.steps, set(made) - wanted)
        else:
            found += run.steps
        left = [*run.behind, *rest]
        if not run.steps:
            return found + left, types
    return found, types


def _first_run(nodes: Sequence[onnx.NodeProto]) -> tuple[Run, list[onnx.NodeProto], Sequence[onnx.NodeProto]]:
    """The first run, nodes that go before it, and those from the first one on that cannot be in it."""
    run, before = Run(), list[onnx.NodeProto]()
    for i, node in enumerate(nodes):
        if run.takes(node):
            continue
        if is_step(node):
            return run, before, nodes[i:]
        before.append(node)
    return run, before, ()


def _types(steps: Iterable[onnx.NodeProto], names: set[str]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, element, None)
        for step in steps
        for name, element in zip(step.output, OUTPUTS[step.op_type], strict=True)
        if name in names
    ]


def chain(steps: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> onnx.NodeProto:
    """Steps as one node; outputs: what is read outside of it."""
    inside = {name for step in steps for name in step.output}
    inputs = list(dict.fromkeys(name for step in steps for name in step.input if name and name not in inside))
    slots, count = _slots(steps, set(outputs))
    registers = {name: i for i, name in enumerate(inputs)}
    registers |= {name: len(inputs) + slot for name, slot in slots.items()}
    registers |= {name: len(inputs) + count + i for i, name in enumerate(outputs)}
    attributes: dict[str, Any] = {"steps": len(steps), "slots": count, "reads": len(inputs), "makes": len(outputs)}
    node = helper.make_node(
        CHAIN, inputs, outputs, name=f"{steps[0].name}+{len(steps) - 1}", domain=DOMAIN, **attributes
    )
    for i, step in enumerate(steps):
        given, made = ((str(registers.get(name, -1)) for name in names) for names in (step.input, step.output))
        texts = {"step": " ".join([step.op_type, *given, ">", *made]), "name": step.name[:LONGEST_NAME]}
        node.attribute.extend(helper.make_attribute(f"{i}_{name}", text) for name, text in texts.items())
        for attribute in step.attribute:
            renamed = node.attribute.add()
            renamed.CopyFrom(attribute)
            renamed.name = f"{i}_{attribute.name}"
    return node


def unchained(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes with the steps of every chain as nodes again: what `chained` was given, but for names of values between steps."""
    for node in nodes:
        yield from _steps(node) if node.domain == DOMAIN and node.op_type == CHAIN else (node,)


def _steps(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    attributes = {a.name: a for a in node.attribute}
    slots = {len(node.input) + i: "" for i in range(attributes["slots"].i)}
    outside = {len(node.input) + len(slots) + i: name for i, name in enumerate(node.output)}
    named = {-1: "", **dict(enumerate(node.input)), **slots, **outside}
    for i in range(attributes["steps"].i):
        kind, *registers = attributes[f"{i}_step"].s.decode().split(" ")
        behind = registers.index(">")
        given, made = ([int(r) for r in part] for part in (registers[:behind], registers[behind + 1 :]))
        inputs, name = [named[r] for r in given], attributes[f"{i}_name"].s.decode()
        named |= {r: f"{name}:{j}" for j, r in enumerate(made) if r in slots}
        step = helper.make_node(kind, inputs, [named[r] for r in made], name=name, domain=DOMAIN)
        for attribute in node.attribute:
            number, _, rest = attribute.name.partition("_")
            if number == str(i) and rest not in ("step", "name"):
                step.attribute.add().CopyFrom(attribute)
                step.attribute[-1].name = rest
        yield step


def _slots(steps: Sequence[onnx.NodeProto], outside: set[str]) -> tuple[dict[str, int], int]:
    """The slot of every value that only steps read, and how many there are; a slot is free again behind the last step that reads it."""
    last = {name: i for i, step in enumerate(steps) for name in (*step.output, *step.input)}
    slots: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for i, step in enumerate(steps):
        for name in step.output:
            if name in outside:
                continue
            count += not free
            slots[name] = free.pop() if free else count - 1
        free += [
            slots[name] for name in dict.fromkeys((*step.input, *step.output)) if name in slots and last[name] == i
        ]
    return slots, count
