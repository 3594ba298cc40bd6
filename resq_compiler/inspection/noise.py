"""Signal to quantization noise at every quantizer and in every quantized weight, in decibels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler import executor, graph_tools, meta, ops

LARGEST = 200.0  # dB; stands for "no noise at all", which JSON cannot say


@torch.no_grad()
def site_noise(gm: GraphModule, ids: Tensor) -> dict[str, dict[str, Any]]:
    """Noise of each quantizer of a compiled graph on token ids [n, length].

    Returns: site name -> kind, block, bits, sqnr_db (all values of the site), largest (greatest magnitude before), in execution
             order. Linear parts: name.partN -> kind "weight" and its sqnr_db; absent in models compiled before it was recorded.
    """
    taps: dict[Node, Callable[[Any], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    for node in gm.graph.nodes:
        site, weight = meta.get(node, meta.QuantizerSite), meta.get(node, meta.WeightNoise)
        if site is not None:
            found[site.name] = {"kind": site.kind, "block": site.block, "bits": site.bits}
            taps[node.args[0]] = _both(taps.get(node.args[0]), _measure(gm, node, found[site.name]))
        part = meta.get(node, meta.LinearPart)
        if weight is not None and part is not None:
            db = LARGEST if weight.relative == 0 else round(-20 * math.log10(weight.relative), 2)
            entry = {"kind": "weight", "block": part.site.block, "bits": part.weight_bits, "sqnr_db": db}
            found[f"{part.site.name}.part{part.index}"] = entry
    outputs = graph_tools.output_args(gm.graph)
    executor.Schedule(gm, outputs[:1], graph_tools.placeholders(gm.graph)).run(executor.first_tokens(gm, ids), taps)
    return found


def _measure(gm: GraphModule, node: Node, entry: dict[str, Any]) -> Callable[[Tensor], None]:
    def tap(x: Tensor) -> None:
        image = graph_tools.run_node(gm, node, {node.args[0]: x})
        image = ops.dequantize(image) if isinstance(image, ops.QuantizedActivation) else image
        entry["sqnr_db"] = decibels(x, image)
        entry["largest"] = float(f"{x.abs().max():.4g}")

    return tap


def _both(first: Callable[[Any], None] | None, second: Callable[[Any], None]) -> Callable[[Any], None]:
    if first is None:
        return second

    def run(x: Any) -> None:
        first(x)
        second(x)

    return run


def decibels(signal: Tensor, image: Tensor) -> float:
    """10 log10(|signal|² / |image - signal|²), rounded to 0.01; LARGEST where they are equal."""
    power = float(signal.double().square().sum())
    noise = float((image.double() - signal.double()).square().sum())
    if noise == 0 or power == 0:
        return LARGEST if noise == 0 else -LARGEST
    return round(min(LARGEST, 10 * math.log10(power / noise)), 2)
