"""What Triton's kernels will not take of a float graph once it is compiled, known before the work is done."""

from __future__ import annotations

from torch.fx import Graph

from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Attention

LATENT = (
    "latent attention, whose keys and values are made from a cache of compressed vectors, which no kernel takes: use the backends "
    "reference or cpu, or an ONNX profile"
)
EXPERTS = "a linear of experts outside of a mixture that grouped kernels take: use the reference backend"


def is_latent(attention: Attention) -> bool:
    """Keys are joined from those of every head and those that all heads share."""
    return is_call(attention.k, aten.cat.default)


def kernel_problem(graph: Graph) -> str | None:
    """The first node of a named graph that the kernels of a GPU will refuse, and why; None where nothing is known against it."""
    attentions = (view for node in graph.nodes if (view := Attention.of(node)) is not None)
    latent = next((view for view in attentions if is_latent(view)), None)
    return None if latent is None else f"node {latent.node.name}: {LATENT}"
