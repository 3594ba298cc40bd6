"""Diagnostics of activations, before and after the compile: what makes a model hard to quantize, and what the bases do about it.

Before: the original model. After, and noise: the compiled graph, whose values have the noise of all rounding before them. Each is
run once, on the same tokens in one batch, and everything is taken from that run. Sites: the inputs of linears (attention_input,
o_input, mlp_input, down_input), new keys and values, and the residual stream after each block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import STREAM_ROLES, Topology
from resq_compiler.calibration import executor
from resq_compiler.frontend.latent import cache_site
from resq_compiler.inspection import statistics
from resq_compiler.inspection.noise import (
    Quantizer,
    Taps,
    add_tap,
    energies,
    input_of,
    quantizer_of,
    quantizers,
    ratio_db,
    scaled_rows,
    site_energies,
    weight_noise,
    without_zero,
)
from resq_compiler.inspection.statistics import SiteStatistics
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.views import AppendCache, Linear, QuantizeDequantize

SITE_OF_ROLE = {**dict.fromkeys(STREAM_ROLES, "attention_input"), "q_b": "qlatent_input", "q_b_rope": "qlatent_input",
              "k_b": "latent_input", "v_b": "latent_input",
                "o": "o_input", "gate": "mlp_input",
                "up": "mlp_input", "down": "down_input"}  # fmt: skip
RESIDUAL_READERS = ("attention_input", "mlp_input")


@dataclass
class Diagnostics:
    """Everything that was measured; names of sites are blocks.N.KIND.

    before, after: statistics by site. high_energy: share of the energy in the high part, by site. noise_db: of each site after
    quantization; raw_noise_db: of the original values quantized whole, at the main bits. one_sided: share of the rows with a scale
    whose range does not hold zero, by site. weight_db: by linear. spectra: ascending eigenvalues of second moments, by name. channels:
    size of each channel raw, after P and after U, by site.
    """

    tokens: int
    before: dict[str, SiteStatistics] = field(default_factory=dict)
    after: dict[str, SiteStatistics] = field(default_factory=dict)
    high_energy: dict[str, float] = field(default_factory=dict)
    noise_db: dict[str, float] = field(default_factory=dict)
    raw_noise_db: dict[str, float] = field(default_factory=dict)
    one_sided: dict[str, float] = field(default_factory=dict)
    weight_db: dict[str, float] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    massive: list[dict[str, Any]] = field(default_factory=list)
    super_weights: list[dict[str, Any]] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def outliers(self, when: str) -> list[dict[str, Any]]:
        """Outlier channels by LLM.int8()'s definition, at the inputs that read the residual stream; when: before or after."""
        sites = getattr(self, when)
        rows = []
        for kind in RESIDUAL_READERS:
            layers = [s.outlier_tokens for name, s in sites.items() if name.endswith(kind)]
            rows += (
                [{"when": when, "site": kind, **row} for row in statistics.outlier_channels(layers)] if layers else []
            )
        return rows


@torch.no_grad()
def diagnose(
    original: GraphModule, topology: Topology, quantized: GraphModule, ids: Tensor, main_bits: int = 4,
    token_text: Callable[[int], str] = str,
) -> Diagnostics:  # fmt: skip
    """Measure one model on token ids [n, length].

    Args:    original, topology: from compiler.trace. quantized: the compiled graph, fresh or loaded. main_bits: of the raw
             values' noise. token_text: text of a token id, for massive activations.
    """
    result = Diagnostics(ids.numel())
    kept: dict[str, Tensor] = {}
    middle = topology.blocks[len(topology.blocks) // 2].index
    shown = (f"blocks.{middle}.attention_input", f"blocks.{middle}.key")
    measure_before(result, original, topology, ids, min(main_bits, 8), token_text, shown, kept)
    measure_after(result, quantized, ids, shown, kept)
    for name in shown:
        if f"{name} raw" in kept and f"{name} U" in kept:
            result.channels[name] = _three_views(kept[f"{name} raw"], kept[f"{name} U"])
    return result


def original_sites(topology: Topology) -> dict[str, Node]:
    """The nodes of all sites of the original graph."""
    sites: dict[str, Node] = {}
    for block in topology.blocks:
        where, a = f"blocks.{block.index}", block.attention
        sites |= {f"{where}.attention_input": Linear.require(a.readers[0]).x}
        sites |= {f"{where}.{kind}": AppendCache.require(cache).new for kind, cache in a.caches.items()}
        sites |= {f"{where}.{v.site}_input": v.value for v in a.vectors}
        sites |= {f"{where}.o_input": Linear.require(a.o).x}
        for feed_forward in block.feed_forwards:
            first, down = [*feed_forward.gates, *feed_forward.ups][0], feed_forward.down
            sites |= {f"{where}.mlp_input": Linear.require(first).x, f"{where}.down_input": Linear.require(down).x}
        sites[f"{where}.residual"] = block.end
    return sites


def measure_before(
    result: Diagnostics, gm: GraphModule, topology: Topology, ids: Tensor, bits: int, token_text: Callable[[int], str],
    shown: tuple[str, ...], kept: dict[str, Tensor],
) -> None:  # fmt: skip
    """Statistics of the original model, massive activations and super weights."""
    taps: Taps = {}
    flat = ids.flatten()

    def see(name: str, x: Tensor) -> None:
        x = _by_token(name, x)
        found = SiteStatistics.of(x)
        result.before[name] = found
        if name.endswith("residual"):
            rows = statistics.massive_values(x, found.median)
            result.massive += [
                {
                    "site": name,
                    "position": t % ids.shape[1],
                    "token": token_text(int(flat[t])),
                    "channel": c,
                    "value": v,
                }
                for t, c, v in rows
            ]
        else:
            image = ops.quantize_dequantize(x, ((bits, 0, x.shape[-1]),))
            result.raw_noise_db[name] = ratio_db(*energies(x, image))
        if name in shown:
            kept[f"{name} raw"] = x.flatten(0, -2)

    for name, node in original_sites(topology).items():
        add_tap(taps, node, partial(see, name))
    _tap_super_weights(result, gm, topology, taps, ids, token_text)
    executor.Schedule(gm, [topology.blocks[-1].end], graph_tools.placeholders(gm.graph)).run(
        executor.first_tokens(gm, ids), taps
    )


def _tap_super_weights(
    result: Diagnostics, gm: GraphModule, topology: Topology, taps: Taps, ids: Tensor, token_text: Callable[[int], str]
) -> None:
    inputs: dict[Node, Tensor] = {}

    def see(down: Linear, block: int, y: Tensor) -> None:
        found = statistics.super_weight(inputs.pop(down.node), y, down.weight_tensor(gm))
        if found is not None:
            token = int(ids.flatten()[int(found.pop("token"))])
            result.super_weights.append({"linear": down.name, "block": block, **found, "token": token_text(token)})

    for block in topology.blocks:
        for feed_forward in block.feed_forwards:
            down = Linear.require(feed_forward.down)
            if down.of_experts:
                continue  # a weight of one expert is not one of the model's few
            add_tap(taps, down.x, partial(inputs.__setitem__, down.node))
            add_tap(taps, down.node, partial(see, down, block.index))


def compiled_sites(gm: GraphModule) -> dict[str, list[Node]]:
    """What is quantized at each site of a compiled (or projected) graph, parts in the order [low | high]; keys and values: one."""
    sites: dict[str, dict[int, Node]] = {}
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is not None and part.site.block is not None:
            quantizer = quantizer_of(node)
            value = input_of(node) if quantizer is None else quantizer.x
            sites.setdefault(f"blocks.{part.site.block}.{SITE_OF_ROLE[part.site.role]}", {})[part.index] = value
    found = {name: [nodes[i] for i in sorted(nodes)] for name, nodes in sites.items()}
    for node in gm.graph.find_nodes(op="call_function", target=ops.append_cache):
        append = AppendCache.require(node)
        match, image = (
            re.fullmatch(r"past_(key|value)_(\d+)", str(append.past.target)),
            QuantizeDequantize.of(append.new),
        )
        if match:
            found[f"blocks.{match[2]}.{cache_site(node) or match[1]}"] = [append.new if image is None else image.x]
    return found


def high_starts(gm: GraphModule) -> dict[str, int]:
    """Where the high part of each cache entry begins, by site; entries of one part are left out."""
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=ops.quantize_dequantize):
        site, parts = meta.get(node, meta.QuantizerSite), QuantizeDequantize.require(node).parts
        if site is not None and len(parts) > 1:
            found[site.name] = parts[-1][1]
    return found


def measure_after(
    result: Diagnostics, gm: GraphModule, ids: Tensor, shown: tuple[str, ...] = (), kept: dict[str, Tensor] | None = None
) -> None:  # fmt: skip
    """One run of the compiled graph: statistics, spectra, energy in the high part, noise of every site (parts together)."""
    taps: Taps = {}
    moments: dict[str, Tensor] = {}
    starts = high_starts(gm)
    kept = {} if kept is None else kept

    def see(name: str, pieces: list[Tensor]) -> None:
        x = _by_token(name, torch.cat(pieces, -1))
        found = result.after[name] = SiteStatistics.of(x)
        start = starts.get(name, x.shape[-1] - pieces[-1].shape[-1])
        if start > 0:
            energy = found.rms.square()
            result.high_energy[name] = float(energy[start:].sum() / energy.sum())
        pool = _pool(name)
        if pool:
            moments[pool] = moments.get(pool, 0) + found.moment
        if name in shown:
            kept[f"{name} U"] = x.flatten(0, -2)

    for name, nodes in compiled_sites(gm).items():
        _tap_together(taps, nodes, partial(see, name))
    _tap_ranges(result, gm, taps)
    _add_noise(result, gm, site_energies(gm, ids, taps))
    for pool, moment in moments.items():
        result.spectra[pool] = torch.linalg.eigvalsh(moment.double()).clamp_min(0)


def _tap_ranges(result: Diagnostics, gm: GraphModule, taps: Taps) -> None:
    """Count the rows of every quantizer whose range does not hold zero; parts of a site together."""
    counts: dict[str, list[int]] = {}

    def see(quantizer: Quantizer, name: str, x: Tensor) -> None:
        total = counts.setdefault(name, [0, 0])
        for rows in scaled_rows(quantizer, x):
            total[0] += without_zero(rows)
            total[1] += len(rows)
        result.one_sided[name] = total[0] / total[1]

    for quantizer, site in quantizers(gm):
        add_tap(taps, quantizer.x, partial(see, quantizer, re.sub(r"\.part\d+$", "", site.name)))


def _pool(site: str) -> str | None:
    """The sites whose second moments are added for a spectrum."""
    kind = site.rpartition(".")[2]
    return "residual stream" if kind in RESIDUAL_READERS else kind if kind in ("key", "value") else None


def _add_noise(result: Diagnostics, gm: GraphModule, energies: dict[str, tuple[float, float]]) -> None:
    """Noise of every site with its parts together, of weights, and mean bits."""
    sums: dict[str, list[float]] = {}
    for name, (signal, noise) in energies.items():
        total = sums.setdefault(re.sub(r"\.part\d+$", "", name), [0.0, 0.0])
        total[0] += signal
        total[1] += noise
    result.noise_db = {name: ratio_db(*pair) for name, pair in sums.items()}
    result.weight_db = weight_noise(gm)
    result.bits = mean_bits(gm)


def mean_bits(gm: GraphModule) -> dict[str, float]:
    """Bits of the columns of each block, averaged: blocks.N.weights, blocks.N.activations, blocks.N.KV cache."""
    counts: dict[str, list[float]] = {}

    def count(block: int, kind: str, bits: float, columns: int) -> None:
        pair = counts.setdefault(f"blocks.{block}.{kind}", [0, 0])
        pair[0] += bits * columns
        pair[1] += columns

    for node in gm.graph.nodes:
        part, site = meta.get(node, meta.LinearPart), meta.get(node, meta.QuantizerSite)
        if part is not None and part.site.block is not None:
            columns = (part.stop - part.start) * part.heads
            count(part.site.block, "weights", part.mean_weight_bits, columns)
            count(part.site.block, "activations", part.activation_bits, columns)
        elif site is not None and site.kind == "kv" and site.block is not None:
            for bits, start, stop in QuantizeDequantize.require(node).parts:
                count(site.block, "KV cache", bits, stop - start)
    return {name: total / columns for name, (total, columns) in counts.items()}


def _three_views(raw: Tensor, turned: Tensor) -> dict[str, Tensor]:
    """Size of each channel raw, along the principal directions (P, ascending) and after U = P R, [3 kinds of channels].

    The directions are those of these very values: turned = x P R, so its eigenvectors give x P up to sign.
    """
    directions = torch.linalg.eigh(turned.double().T @ turned.double())[1].float()
    views = {"raw": raw, "P": turned.float() @ directions, "U": turned.float()}
    return {name: x.abs().amax(0) for name, x in views.items()}


def _by_token(name: str, x: Tensor) -> Tensor:
    """Keys and values [B, G, S, D] with one row for each token and head; others as they are."""
    return x.transpose(1, 2) if name.endswith((".key", ".value", ".latent")) and x.dim() == 4 else x


def _tap_together(taps: Taps, nodes: list[Node], see: Callable[[list[Tensor]], None]) -> None:
    """Call `see` with the values of all nodes once the last of them is there."""
    values: dict[Node, Tensor] = {}

    def tap(node: Node, x: Tensor) -> None:
        values[node] = x
        if len(values) == len(nodes):
            see([values[n] for n in nodes])
            values.clear()

    for node in nodes:
        add_tap(taps, node, partial(tap, node))
