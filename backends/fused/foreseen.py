"""What Triton's kernels will not take of a float graph once it is compiled, known before the work is done."""

from __future__ import annotations

from torch.fx import Graph, Node

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Attention

LATENT = (
    "latent attention, whose keys and values are made from a cache of compressed vectors, which no kernel takes: use the backends "
    "reference or cpu, or an ONNX profile"
)
EXPERTS = "a linear of experts: there is no grouped kernel; use the backends reference or cpu, or an ONNX profile"


def is_latent(attention: Attention) -> bool:
    """Keys are joined from those of every head and those that all heads share."""
    return is_call(attention.k, aten.cat.default)


def kernel_problem(graph: Graph) -> str | None:
    """The first node of a named graph that the kernels of a GPU will refuse, and why; None where nothing is known against it."""
    for node in graph.nodes:
        reason = _reason(node)
        if reason is not None:
            return f"node {node.name}: {reason}"
    return None


def _reason(node: Node) -> str | None:
    attention = Attention.of(node)
    if attention is not None:
        return LATENT if is_latent(attention) else None
    return EXPERTS if is_call(node, ops.expert_linear) else None
