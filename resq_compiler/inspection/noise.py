"""Signal to quantization noise at every quantizer and in every quantized weight, in decibels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import is_call

Taps = dict[Node, Callable[[Any], None]]
LARGEST = 200.0  # dB; stands for "no noise at all", which JSON cannot say


def site_noise(gm: GraphModule, ids: Tensor) -> dict[str, dict[str, Any]]:
    """Noise of each quantizer and of each weight of a compiled graph, on token ids [n, length].

    Returns: name -> kind ("activation", "kv" or "weight"), block, bits, sqnr_db, in execution order. Weights are named
             linear.partN, and absent in models compiled before their noise was recorded.
    """
    energies = site_energies(gm, ids)
    weights = weight_noise(gm)
    found: dict[str, dict[str, Any]] = {}
    for node in gm.graph.nodes:
        site, part = meta.get(node, meta.QuantizerSite), meta.get(node, meta.LinearPart)
        if site is not None:
            entry = {"kind": site.kind, "block": site.block, "bits": site.bits}
            found[site.name] = {**entry, "sqnr_db": ratio_db(*energies[site.name])}
        name = part_name(part) if part is not None else ""
        if part is not None and name in weights:
            entry = {"kind": "weight", "block": part.site.block, "bits": part.weight_bits}
            found[name] = {**entry, "sqnr_db": weights[name]}
    return found


@torch.no_grad()
def site_energies(gm: GraphModule, ids: Tensor, taps: Taps | None = None) -> dict[str, tuple[float, float]]:
    """(sum of x², sum of (image - x)²) of each quantizer, by its name; `taps` see values of the same run."""
    quantizers: dict[Node, list[Node]] = {}
    found: dict[str, tuple[float, float]] = {}
    for node in gm.graph.nodes:
        if meta.get(node, meta.QuantizerSite) is not None:
            quantizers.setdefault(node.args[0], []).append(node)

    def tap_of(nodes: list[Node]) -> Callable[[Any], None]:
        def see(x: Tensor) -> None:
            for node in nodes:
                image = graph_tools.run_node(gm, node, {node.args[0]: x})
                image = ops.dequantize(image) if isinstance(image, ops.QuantizedActivation) else image
                found[meta.get(node, meta.QuantizerSite).name] = energies(x, image)

        return see

    together = dict(taps or {})
    for source, nodes in quantizers.items():
        add_tap(together, source, tap_of(nodes))
    schedule = executor.Schedule(gm, graph_tools.output_args(gm.graph)[:1], graph_tools.placeholders(gm.graph))
    schedule.run(executor.first_tokens(gm, ids), together)
    return found


def add_tap(taps: Taps, node: Node, tap: Callable[[Any], None]) -> None:
    """One more reader of a node's value."""
    before = taps.get(node)

    def both(x: Any) -> None:
        if before is not None:
            before(x)
        tap(x)

    taps[node] = both


def energies(x: Tensor, image: Tensor) -> tuple[float, float]:
    """(sum of x², sum of (image - x)²), rows in float32 and their sum in float64."""
    return tuple(float(v.square().sum(-1, dtype=torch.float32).sum(dtype=torch.float64)) for v in (x, image - x))


def scaled_rows(node: Node, x: Tensor) -> list[Tensor]:
    """The values of x that share a scale of a quantizer node, as rows: [rows, width], a matrix for each part."""
    if is_call(node, ops.quantize):
        return [x.reshape(-1, x.shape[-1] // (node.args[2] if len(node.args) > 2 else 1))]
    return [x[..., start:stop].flatten(0, -2) for _, start, stop in node.args[1]]


def without_zero(rows: Tensor) -> int:
    """How many rows lie on one side of zero, so that a range that must include zero is wider than theirs."""
    return int(((rows.amin(-1) > 0) | (rows.amax(-1) < 0)).sum())


def weight_noise(gm: GraphModule) -> dict[str, float]:
    """Decibels of each quantized weight, by linear.partN."""
    result = {}
    for node in gm.graph.nodes:
        fact, part = meta.get(node, meta.WeightNoise), meta.get(node, meta.LinearPart)
        if fact is not None and part is not None:
            result[part_name(part)] = ratio_db(1.0, fact.relative**2)
    return result


def quantizer_of(node: Node) -> Node | None:
    """The activation quantizer before a linear part."""
    source = node.args[0]
    source = source.args[0] if is_call(source, ops.dequantize) else source
    return source if is_call(source, ops.quantize) else None


def part_name(part: meta.LinearPart) -> str:
    """The name of a part of a linear: linear.partN."""
    return f"{part.site.name}.part{part.index}"


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), rounded to 0.01 and kept within ±LARGEST."""
    if noise == 0 or signal == 0:
        return LARGEST if noise == 0 else -LARGEST
    return round(min(LARGEST, 10 * math.log10(signal / noise)), 2)
