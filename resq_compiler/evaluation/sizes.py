"""What a compiled model costs: average bits, bytes in memory, bytes of cache for a token.

Everything is read off the quantized graph: nothing relies on how it was made, so a loaded model reports as a fresh one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.linears import PARTS, read_part
from resq_compiler.ir.transforms import TARGETS
from resq_compiler.ir.views import AppendCache, CodedLinear, Linear, Quantize, QuantizeDequantize
from resq_compiler.numerics.packing import packed_length
from resq_compiler.result import CompileResult

SCALE_BITS, ZERO_POINT_BITS = 32, 8  # float32 scales; zero points lie in the range of the codes, so a byte holds them


@dataclass(frozen=True)
class AverageBits:
    """Bits for each value, averaged; what stays in float counts as 16. Scales and zero points are in the *_scales fields alone.

    weights: over all weights of the linears in decoder blocks; embeddings and lm_head are left out. weight_scales: one
    scale (32 bits) for each output row of each part, or of each group of its columns. activations: over all columns of the
    inputs of those linears, an input that several linears read counted once. activation_scales: a scale (32) and a zero
    point (8) for each token and group.
    kv: over all columns of cached keys and values. kv_scales: a scale and a zero point for each token, head and part.
    """

    weights: float
    weight_scales: float
    activations: float
    activation_scales: float
    kv: float
    kv_scales: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Mean:
    """Bits of values and of their scales, summed over `count` values."""

    bits: float = 0.0
    scales: float = 0.0
    count: int = 0

    def add(self, count: int, bits: float, scales: float) -> None:
        self.count += count
        self.bits += count * bits
        self.scales += scales

    def values(self) -> tuple[float, float]:
        return (self.bits / self.count, self.scales / self.count) if self.count else (float(FLOAT_BITS), 0.0)


def average_bits(compiled: CompileResult) -> AverageBits:
    """Average bits of weights, activations and cache; see AverageBits for what is counted."""
    gm = compiled.graph_module
    weights, activations = _Mean(), _Mean()
    inputs: set[Node] = set()
    for node, part in _parts(gm):
        if part.site.role == "head":
            continue
        view = read_part(node)
        coded = isinstance(view, CodedLinear)
        *rows, columns = graph_tools.held(gm, view.qdata if isinstance(view, CodedLinear) else view.weight).shape
        scales = graph_tools.held(gm, view.scale).numel() if isinstance(view, CodedLinear) else 0
        weights.add(math.prod(rows) * columns, part.mean_weight_bits if coded else FLOAT_BITS, scales * SCALE_BITS)
        if view.x not in inputs:
            inputs.add(view.x)
            quantizer = Quantize.of(view.x)
            groups = quantizer.groups if quantizer is not None else 0
            bits = part.activation_bits if groups else FLOAT_BITS
            activations.add(columns, bits, groups * (SCALE_BITS + ZERO_POINT_BITS))
    kv = _Mean()
    for heads, width, parts in _cache_entries(compiled):
        for bits, start, stop in parts or ((FLOAT_BITS, 0, width),):
            scale = heads * (SCALE_BITS + ZERO_POINT_BITS) if parts else 0
            kv.add(heads * (stop - start), bits, scale)
    return AverageBits(*weights.values(), *activations.values(), *kv.values())


def memory_bytes(compiled: CompileResult) -> dict[str, int]:
    """Bytes of a compiled model by kind, codes at their packed width, and "total".

    weight_codes, weight_scales: linears of the blocks. head: lm_head, scales included. embeddings: tables of tokens and
    positions. projections: bases applied at run time. other: biases, norm gains, rotary tables. The reference backend itself
    holds a code of any width in one byte: see `resident_bytes`.
    """
    gm = compiled.graph_module
    size = dict.fromkeys(("weight_codes", "weight_scales", "embeddings", "head", "projections", "other"), 0)
    counted: set[str] = set()
    for node, kind, count in _tensors(gm):
        if str(node.target) not in counted:
            counted.add(str(node.target))
            size[kind] += count
    size["total"] = sum(size.values())
    return size


def active_part(compiled: CompileResult) -> dict[str, dict[str, int]]:
    """Of a model with experts, {"active": ...}: how many weights of its blocks a token goes through, of how many, and the bytes of their
    codes and scales; nothing where a token goes through all of them."""
    gm, found = compiled.graph_module, dict.fromkeys(("weights", "active_weights", "bytes", "active_bytes"), 0)
    for node, part in _parts(gm):
        if part.site.role == "head":
            continue
        view = read_part(node)
        held = graph_tools.held(gm, view.qdata if isinstance(view, CodedLinear) else view.weight)
        size = held.nbytes
        if isinstance(view, CodedLinear):
            size = packed_bytes(held.shape, part) + graph_tools.held(gm, view.scale).nbytes
        choices, experts = (1, 1) if view.indices is None else (values.width(view.indices), held.shape[0])
        for name, total in (("weights", held.numel()), ("bytes", size)):
            found[name] += total
            found[f"active_{name}"] += total * choices // experts
    return {"active": found} if found["active_weights"] < found["weights"] else {}


def resident_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of a model as it computes; names of one tensor count once."""
    return sum({t.data_ptr(): t.nbytes for t in module.state_dict().values()}.values())


def cache_bytes_per_token(compiled: CompileResult) -> int:
    """Bytes that one token takes in a packed cache, scales and zero points included."""
    total = 0.0
    for heads, width, parts in _cache_entries(compiled):
        if not parts:
            total += 4 * heads * width
        for bits, start, stop in parts:
            total += heads * (packed_length(stop - start, _cache_width(bits)) + (SCALE_BITS + ZERO_POINT_BITS) / 8)
    return math.ceil(total)


def _cache_width(bits: int) -> int:
    """Of a code in packed caches, which want whole codes in a byte."""
    return bits if bits in (2, 4) else 8


def describe(compiled: CompileResult) -> dict[str, Any]:
    """Scheme, average bits and sizes as plain values."""
    return {
        "recipe": compiled.options.recipe,
        "scheme": compiled.options.scheme,
        "average_bits": average_bits(compiled).to_dict(),
        "memory_bytes": memory_bytes(compiled),
        **active_part(compiled),
        "cache_bytes_per_token": cache_bytes_per_token(compiled),
    }


def _parts(gm: GraphModule) -> Iterator[tuple[Node, meta.LinearPart]]:
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is not None and is_call(node, *PARTS):
            yield node, part


def _tensors(gm: GraphModule) -> Iterator[tuple[Node, str, int]]:
    """Every tensor of the graph with its kind and bytes; a tensor may come more than once, most telling kind first."""
    for node, part in _parts(gm):
        head, view = part.site.role == "head", read_part(node)
        if isinstance(view, CodedLinear):
            yield view.qdata, "head" if head else "weight_codes", packed_bytes(view.codes(gm).shape, part)
            yield view.scale, "head" if head else "weight_scales", _bytes(gm, view.scale)
        else:
            yield view.weight, "head" if head else "weight_codes", _bytes(gm, view.weight)
    for node in gm.graph.nodes:
        site = meta.get(node, meta.LinearSite)
        if site is not None and site.role == "head":
            weight = Linear.require(node).weight
            yield weight, "head", _bytes(gm, weight)
    for node in gm.graph.find_nodes(op="get_attr"):
        yield node, _kind(node), _bytes(gm, node)


def packed_bytes(shape: torch.Size, part: meta.LinearPart) -> int:
    """Of codes [..., columns], every row packed at its width."""
    bits = part.expert_bits or (part.weight_bits,)
    return sum(math.prod(shape[:-1]) // len(bits) * packed_length(shape[-1], b) for b in bits)


def _kind(tensor: Node) -> str:
    user = next(iter(tensor.users), None)
    if is_call(user, aten.embedding.default):
        return "embeddings"
    return "projections" if is_call(user, *TARGETS) else "other"


def _bytes(gm: GraphModule, tensor: Node) -> int:
    value = graph_tools.held(gm, tensor)
    return value.numel() * value.element_size()


def _cache_entries(compiled: CompileResult) -> Iterator[tuple[int, int, tuple[tuple[int, int, int], ...]]]:
    """Heads, width and parts (bits, start, stop) of every layer's keys and values; no parts: kept in float."""
    appends = map(
        AppendCache.require, compiled.graph_module.graph.find_nodes(op="call_function", target=ops.append_cache)
    )
    new = {str(append.past.target): append.new for append in appends}
    for i, spec in enumerate(compiled.cache_specs):
        for kind, width in (("key", spec.key_dim), ("value", spec.value_dim)):
            quantizer = QuantizeDequantize.of(new.get(f"past_{kind}_{i}"))
            yield spec.num_heads, width, quantizer.parts if quantizer is not None else ()
