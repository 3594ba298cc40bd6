"""Lower a quantized graph to the fused operators `torch.ops.resq.*` of a target.

    columns + quantize (+ rms_norm, layer_norm)          -> norm_quantize
    quantized_linear + ... + add (+ bias) (+ residual)   -> mixed_linear; linears of one input stacked
    hadamard(act(gate) * up) + quantize                  -> hadamard_quantize
    norms, rope, U_C, quantize_dequantize, append_cache  -> rope_cache       past keys and values become packed, written in place
    attention (+ the quantization of o's input)          -> attention, attention_quantize
    attention over linears of cached vectors             -> latent_attention     or cache_image: attention over what is made then stays
    linears of experts and what lies between them        -> experts              one for each mixture, routing outside

Everything else in the graph (embedding, lm_head, the last norm) is PyTorch and stays. A quantized node that cannot be taken is listed
with the reason, and so is a float node next to one that stays though an operator could have taken it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.experts import ExpertCodesAt
from resq_compiler.backends.fused.formats import HeadParts
from resq_compiler.backends.fused.lowering import Lowering
from resq_compiler.backends.fused.lowering_attention import lower_attentions
from resq_compiler.backends.fused.lowering_experts import lower_experts
from resq_compiler.backends.fused.lowering_linears import lower_linears
from resq_compiler.backends.fused.patterns import leftover
from resq_compiler.backends.fused.source import CodesAt
from resq_compiler.backends.fused.target import Target
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST
from resq_compiler.ir import graph_tools, ops, verify
from resq_compiler.ir.args import argument, source
from resq_compiler.ir.transforms import TARGETS
from resq_compiler.ir.views import CodedLinear, Hadamard

aten = torch.ops.aten
QUANTIZED = {ops.quantize, *CodedLinear.targets, ops.attention}
TORCH_READERS = {aten.embedding.default, aten.linear.default, *TARGETS}


@dataclass(frozen=True)
class Lowered:
    """A lowered graph. Inputs: input_ids, attention_mask, position_ids, `cache_table` where the target has one, `cache_start`, then
    two tensors a layer: packed keys and values (parts in `caches`), or float past key and value (None there). Outputs: logits, then
    key and value of the layers whose cache is float.

    heads: key/value heads and their columns, of each cache input.    places: where the weight codes of the quantized graph went.
    reasons: quantized nodes that were left to PyTorch.    left: float nodes that stayed though an operator could have taken them.
    """

    graph_module: GraphModule
    target: Target
    caches: tuple[tuple[HeadParts, HeadParts] | None, ...]
    heads: tuple[tuple[int, int], ...]
    places: dict[str, CodesAt | ExpertCodesAt]
    reasons: dict[str, str]
    left: dict[str, str]


def lower(
    gm: GraphModule,
    target: Target,
    dtype: torch.dtype = torch.float32,
    allow_fallback: bool = False,
    later: bool = False,
) -> Lowered:
    """Lower `gm` in place.

    Args:    dtype: of everything between the integers (residual stream, queries, logits' input); scales stay float32.
             allow_fallback: leave what cannot be taken to PyTorch instead of raising; the reasons are in the result.
             later: packed weights are promises, made when somebody asks; for graphs on the CPU.
    Raises:  BackendError: quantized nodes that no operator takes, each with its reason.
    """
    low = Lowering(gm, target, dtype, later)
    lower_attentions(low)
    lower_experts(low)
    lower_linears(low)
    _finish(low)
    if not allow_fallback:
        check_taken(target, low.reasons)
    lowered = Lowered(gm, target, tuple(low.caches), tuple(low.heads), low.places, low.reasons, low.left)
    devices = [t.device for t in gm.buffers() if not t.is_meta]
    verify.propagate_shapes(gm, tuple(t.to(devices[0] if devices else "cpu") for t in example_inputs(lowered)))
    return lowered


def check_taken(target: Target, reasons: Mapping[str, str]) -> None:
    """Raise BackendError that lists quantized nodes no operator takes, if there are any."""
    if reasons:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in sorted(reasons.items()))
        raise BackendError(
            f"backend {target.name} cannot take {len(reasons)} nodes:{listed}\n"
            "use backend='reference', or allow_fallback=True to leave them to PyTorch"
        )


def example_inputs(
    lowered: Lowered, batch: int = EXAMPLE_BATCH, new: int = EXAMPLE_NEW, past: int = EXAMPLE_PAST
) -> tuple[Tensor, ...]:
    """Zeros in the order of a lowered graph's inputs, with caches that have room for past + new tokens."""
    cpu, total, cache = torch.device("cpu"), past + new, lowered.target.cache
    ids, capacity, caches = torch.zeros(batch, new, dtype=torch.int64), total, []
    for i, (heads, width) in enumerate(lowered.heads):
        parts = lowered.caches[i // 2]
        if parts is None:
            caches.append(torch.zeros(batch, heads, past, width))
        else:
            caches.append(cache.allocate(batch, heads, parts[i % 2], total, cpu).zero_())
            capacity = cache.capacity(caches[-1], batch)
    table = cache.table(batch, capacity, cpu)
    start = torch.full((batch,), past, dtype=torch.int32)
    tables = [] if table is None else [table]
    return ids, torch.ones(batch, total, dtype=torch.int64), ids.clone(), *tables, start, *caches


def _finish(low: Lowering) -> None:
    """Outputs and inputs of the lowered graph, then dead code; what quantized operators are left gets a reason."""
    _rewrite_lengths(low)
    _rewrite_ends(low)
    _rewrite_transforms(low)
    low.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _cast(low)
    graph_tools.delete_unused_tensors(low.gm)
    for node in low.graph.nodes:
        if node.op == "call_function" and node.target in QUANTIZED and node.name not in (low.reasons | low.left):
            low.reasons[node.name] = leftover(node)
    low.graph.lint()
    low.gm.recompile()


def _rewrite_lengths(low: Lowering) -> None:
    """Lengths of the past that the graph reads off a cache: a packed one has room for more tokens than it holds."""
    for node in list(low.graph.find_nodes(op="call_function", target=aten.sym_size.int)):
        of = source(node)
        packed = of in low.cache_inputs and low.caches[low.cache_inputs.index(of) // 2] is not None
        if packed and argument(node, "dim") == 2:
            with low.graph.inserting_before(node):
                total, new = (low.emit(aten.sym_size.int, (tokens, 1), node) for tokens in (low.mask, low.ids))
                length = low.emit(operator.sub, (total, new), node)
            low.replace(node, length)


def _rewrite_ends(low: Lowering) -> None:
    """Packed caches are inputs under a name of their own, written in place, and no outputs."""
    logits, *present = graph_tools.output_args(low.graph)
    (output,) = low.graph.find_nodes(op="output")
    output.args = ((logits, *(x for i, x in enumerate(present) if low.caches[i // 2] is None)),)
    for i, node in enumerate(low.cache_inputs):
        if low.caches[i // 2] is not None:
            name = f"{('key', 'value')[i % 2]}_cache_{i // 2}"
            node.target = name
            node._rename(name)


def _rewrite_transforms(low: Lowering) -> None:
    """Hadamard transforms that stay become operators of their own."""
    for node in list(low.graph.find_nodes(op="call_function", target=ops.hadamard)):
        view = Hadamard.require(node)
        arguments = (view.x, view.transpose, list(view.sizes or ()))
        graph_tools.rewrite(node, operators.hadamard, arguments, low.made_by)


def _cast(low: Lowering) -> None:
    """Float tensors that PyTorch's operators read, in the model's type."""
    if low.dtype == torch.float32:
        return
    for node in low.graph.find_nodes(op="get_attr"):
        value = low.value_of(node)
        if value.is_floating_point() and any(user.target in TORCH_READERS for user in node.users):
            graph_tools.set_tensor(low.gm, str(node.target), value.to(low.dtype))
