"""Signal to quantization noise at every quantizer and in every quantized weight, in decibels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.views import CodedLinear, Dequantize, Linear, Quantize, QuantizeDequantize
from resq_compiler.numerics.quantized import QuantizedActivation

Taps = dict[Node, Callable[[Any], None]]
LARGEST = 200.0  # dB; stands for "no noise at all", which JSON cannot say


@dataclass(frozen=True)
class QuantizerNoise:
    """Noise that one quantizer adds, over all tokens that were run: signal to quantization noise, inf where nothing was lost."""

    name: str
    kind: str  # "activation" or "kv"
    block: int | None
    bits: int
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def quantizer_noise(
    gm: GraphModule, windows: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[QuantizerNoise]:
    """Compare what enters every quantizer of a compiled graph with the float image of what leaves it.

    Both are taken from one run of the graph, so a quantizer shows its own noise, not that of the ones before it.

    Args:    windows: token ids [n, length] int64. progress: called with (batches done, all batches).
    Returns: in execution order.
    """
    sums: dict[str, list[float]] = {}
    batches = executor.batches(windows.to(next(gm.buffers()).device))
    for i, ids in enumerate(batches):
        for name, (signal, noise) in site_energies(gm, ids).items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += signal
            total[1] += noise
        progress(i + 1, len(batches))
    return [QuantizerNoise(s.name, s.kind, s.block, s.bits, decibels(*sums[s.name])) for _, s in quantizers(gm)]


def noise_by_name(gm: GraphModule, ids: Tensor) -> dict[str, dict[str, Any]]:
    """Noise of each quantizer and of each weight of a compiled graph, on token ids [n, length] in one batch, for a dump.

    Returns: name -> kind ("activation", "kv" or "weight"), block, bits, sqnr_db, in execution order. Weights are named
             linear.partN, and absent in models compiled before their noise was recorded.
    """
    energies = site_energies(gm, ids)
    weights = weight_noise(gm)
    found: dict[str, dict[str, Any]] = {}
    for node in gm.graph.nodes:
        site, part = meta.get(node, meta.QuantizerSite), meta.get(node, meta.LinearPart)
        if site is not None:
            entry: dict[str, Any] = {"kind": site.kind, "block": site.block, "bits": site.bits}
            found[site.name] = {**entry, "sqnr_db": ratio_db(*energies[site.name])}
        name = part_name(part) if part is not None else ""
        if part is not None and name in weights:
            entry = {"kind": "weight", "block": part.site.block, "bits": part.mean_weight_bits}
            found[name] = {**entry, "sqnr_db": weights[name]}
    return found


@torch.no_grad()
def site_energies(gm: GraphModule, ids: Tensor, taps: Taps | None = None) -> dict[str, tuple[float, float]]:
    """(sum of x², sum of (image - x)²) of each quantizer, by its name; `taps` see values of the same run."""
    found: dict[str, tuple[float, float]] = {}

    def see(quantizer: Quantizer, name: str, x: Tensor) -> None:
        image = executor.evaluate(gm, quantizer.node, {quantizer.x: x})
        found[name] = energies(x, ops.dequantize(image) if isinstance(image, QuantizedActivation) else image)

    together = dict(taps or {})
    for quantizer, site in quantizers(gm):
        add_tap(together, quantizer.x, partial(see, quantizer, site.name))
    schedule = executor.Schedule(gm, list(together), graph_tools.placeholders(gm.graph))
    schedule.run(executor.first_tokens(gm, ids), together)
    return found


Quantizer = Quantize | QuantizeDequantize


def quantizers(gm: GraphModule) -> Iterator[tuple[Quantizer, meta.QuantizerSite]]:
    """The quantizers of a compiled graph with their sites, in execution order."""
    for node in gm.graph.nodes:
        site = meta.get(node, meta.QuantizerSite)
        if site is not None:
            yield Quantize.of(node) or QuantizeDequantize.require(node), site


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
    return _energy(x), _energy(image - x)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(-1, dtype=torch.float32).sum(dtype=torch.float64))


def scaled_rows(quantizer: Quantizer, x: Tensor) -> list[Tensor]:
    """The values of x that share a scale of a quantizer, as rows: [rows, width], a matrix for each part."""
    if isinstance(quantizer, Quantize):
        return [x.reshape(-1, x.shape[-1] // quantizer.groups)]
    return [x[..., start:stop].flatten(0, -2) for _, start, stop in quantizer.parts]


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


def input_of(part: Node) -> Node:
    """What a part of a linear reads: codes, their float image, or a float value."""
    return (Linear.of(part) or CodedLinear.require(part)).x


def quantizer_of(part: Node) -> Quantize | None:
    """The activation quantizer before a part of a linear."""
    source = input_of(part)
    image = Dequantize.of(source)
    return Quantize.of(source if image is None else image.codes)


def part_name(part: meta.LinearPart) -> str:
    """The name of a part of a linear: linear.partN."""
    return f"{part.site.name}.part{part.index}"


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where one of them is nothing."""
    if noise == 0 or signal == 0:
        return math.inf if noise == 0 else -math.inf
    return 10 * math.log10(signal / noise)


def ratio_db(signal: float, noise: float) -> float:
    """Decibels rounded to 0.01 and kept within ±LARGEST."""
    return round(max(-LARGEST, min(LARGEST, decibels(signal, noise))), 2)
