"""The emitters of FX operators: each module emit_*.py registers its own when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resq_compiler.backends.onnx.values import Emitted
from torch.fx import Graph, GraphModule, Node

from resq_compiler.errors import BackendError
from resq_compiler.ir.serialize import target_name

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering

Emitter = Callable[["Lowering", Node], Emitted]
EMITTERS: dict[Any, Emitter] = {}


def emits(*targets: Any) -> Callable[[Emitter], Emitter]:
    """Register the emitter of FX operators."""

    def register(function: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def emitter_of(node: Node) -> Emitter:
    """The emitter of a node's operator. Raises BackendError: there is none."""
    if node.target not in EMITTERS:
        raise BackendError(unsupported([node]), node=node.name)
    return EMITTERS[node.target]


def unsupported(nodes: list[Node]) -> str:
    """The message for operators that have no ONNX form."""
    lines = ", ".join(f"{n.name} ({target_name(n.target)})" for n in nodes[:5])
    return (
        f"onnx: no ONNX form for {len(nodes)} node(s): {lines}; expected operators of resq_compiler.ir.ops or one of "
        f"{len(EMITTERS)} known operators; add an emitter with resq_compiler.backends.onnx.registry.emits"
    )


def without_form(graph: Graph) -> list[Node]:
    """Nodes of operators that no emitter takes."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target not in EMITTERS]


def check_supported(gm: GraphModule) -> None:
    """Raise BackendError, before anything is written, that names every operator without an ONNX form."""
    missing = without_form(gm.graph)
    if missing:
        raise BackendError(unsupported(missing), node=missing[0].name)
