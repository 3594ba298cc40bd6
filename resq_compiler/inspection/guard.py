"""What every compile checks at its end, on the beginning of a calibration window: whether predictions are still those of the float model,
and which quantizers keep far less than their bits could.

A quantizer of values that linears read is judged as these see it: every channel counts by the energy of the weights that read it, and every
token alike. What bits could keep is what they keep of Gaussian values of that width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.inspection.noise import Quantizer, add_tap, quantizer_of, quantizers
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.expert_views import pieces
from resq_compiler.ir.views import CodedLinear, Linear, Quantize
from resq_compiler.numerics.quantized import QuantizedActivation
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import devices, memory

TOKENS = 64
MOST_KL = 1.0  # nats a token; 4-bit models that are of use stay far below
FAR = 12.0  # dB below what the bits could keep

HELP = {
    "a channel far larger than the others": "a recipe that rotates (resq+), or more columns with high bits (high_fraction)",
    "tokens with massive activations": "prefix_tokens=auto",
    "channels near dead beside the others": "down_proj=energy-split",
    "a few values far larger than the others": "more bits (activation_bits, kv_bits), or a recipe that rotates (resq+)",
}
"""Why a quantizer keeps little, and what helps."""


@dataclass(frozen=True)
class Weak:
    """A quantizer that keeps little: signal to noise as it is and as Gaussian values would have it, in dB, and why."""

    name: str
    kept: float
    possible: float
    why: str


@memory.sparing()
@torch.no_grad()
def predictions(gm: GraphModule, ids: Tensor) -> Tensor:
    """Log probabilities [n, length, vocabulary] of a graph for token ids [n, length]."""
    logits = graph_tools.output_args(gm.graph)[0]
    env: dict[Node, Any] = executor.first_tokens(gm, ids)
    executor.Schedule(gm, [logits], env).run(env)
    return env[logits].float().log_softmax(-1)


def findings(gm: GraphModule, ids: Tensor, reference: Tensor) -> list[str]:
    """What a user should know about a compiled graph: notes. reference: predictions of the float graph for the same ids."""
    kl = divergence(reference, predictions(gm, ids))
    notes = []
    if not kl <= MOST_KL:
        notes.append(
            f"WARNING: predictions have little to do with those of the float model: KL divergence {kl:.2f} nats a token on calibration "
            f"text, expected below {MOST_KL:g}; use more bits, or the recipe resq+; resq inspect --attribute says where it comes from"
        )
    return [*notes, *describe(weak_quantizers(gm, ids))]


def divergence(reference: Tensor, found: Tensor) -> float:
    """KL(reference || found) of log probabilities [n, length, vocabulary], mean over tokens, one of them at a time."""
    tokens = zip(reference.flatten(0, -2), found.flatten(0, -2), strict=True)
    return float(torch.stack([(p.exp() * (p - q)).sum() for p, q in tokens]).mean())


def describe(weak: list[Weak]) -> list[str]:
    """A note for each reason, with the weakest quantizer."""
    notes = []
    for why, help_ in HELP.items():
        alike = sorted((w for w in weak if w.why == why), key=lambda w: w.kept - w.possible)
        if alike:
            worst = alike[0]
            notes.append(
                f"noise: {len(alike)} quantizers keep far less than their bits could: {why}; weakest {worst.name}, {worst.kept:.0f} dB "
                f"where Gaussian values keep {worst.possible:.0f}; what may help: {help_}"
            )
    return notes


@memory.sparing()
@torch.no_grad()
def weak_quantizers(gm: GraphModule, ids: Tensor) -> list[Weak]:
    """Quantizers that keep less than their bits could by more than FAR dB."""
    found: list[Weak] = []
    taps: dict[Node, Callable[[Any], None]] = {}
    weights = read_energies(gm)

    def see(quantizer: Quantizer, name: str, x: Tensor) -> None:
        image = executor.evaluate(gm, quantizer.node, {quantizer.x: x})
        image = ops.dequantize(image) if isinstance(image, QuantizedActivation) else image
        weight = weights.get(quantizer.node, torch.ones(x.shape[-1])).to(x.device)
        kept, possible = signal_to_noise(x, image - x, weight), possible_of(quantizer, x.shape[-1])
        if kept < possible - FAR:
            found.append(Weak(name, kept, possible, reason(x)))

    for quantizer, site in quantizers(gm):
        add_tap(taps, quantizer.x, functools.partial(see, quantizer, site.name))
    executor.Schedule(gm, list(taps), graph_tools.placeholders(gm.graph)).run(executor.first_tokens(gm, ids), taps)
    return found


def read_energies(gm: GraphModule) -> dict[Node, Tensor]:
    """For each quantizer that linears read, the energy of their weights in every channel: [width]."""
    found: dict[Node, Tensor] = {}
    for node in gm.graph.nodes:
        quantizer = quantizer_of(node) if meta.get(node, meta.LinearPart) is not None else None
        if quantizer is None:
            continue
        coded = CodedLinear.of(node)
        linear = Linear.require(node) if coded is None else coded
        # in place: a small result that stays between large ones would break up the heap
        energy, matrices = devices.here(torch.zeros(values.width(quantizer.x))), 0
        for weight in pieces(gm, linear):
            energy += devices.here(weight).float().square().sum(0)
            matrices += 1
        energy /= matrices if linear.of_experts else 1
        found[quantizer.node] = found[quantizer.node] + energy if quantizer.node in found else energy
    return found


def signal_to_noise(x: Tensor, error: Tensor, weight: Tensor) -> float:
    """dB, mean over tokens, every channel counting by `weight`."""
    tiny = torch.finfo(torch.float32).tiny
    power, noise = ((weight * v.float().square()).sum(-1).clamp_min(tiny) for v in (x, error))
    return float((10 * (power / noise).log10()).mean())


def possible_of(quantizer: Quantizer, width: int) -> float:
    """What the bits of a quantizer keep of Gaussian values."""
    if isinstance(quantizer, Quantize):
        return gaussian(((quantizer.bits, 0, width // quantizer.groups),))
    return gaussian(tuple(quantizer.parts))


@functools.cache
def gaussian(parts: tuple[tuple[int, int, int], ...]) -> float:
    """dB of (bits, start, stop) of Gaussian rows."""
    x = torch.randn(256, parts[-1][2], generator=generator(0, "guard"))
    return signal_to_noise(x, ops.quantize_dequantize(x, parts) - x, torch.ones(()))


def reason(x: Tensor) -> str:
    """Why values x [..., width] are hard to quantize: a key of HELP."""
    channel, token, dead, other = HELP
    energy = x.flatten(0, -2).float().square()
    by_token = energy.sum(-1)
    share = (energy / by_token.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).mean(0)
    if float(share.max()) > 0.5:
        return channel
    if float(by_token.max()) > 1000 * float(by_token.median()):
        return token
    return dead if float(share.median()) < 1e-4 * float(share.mean()) else other
