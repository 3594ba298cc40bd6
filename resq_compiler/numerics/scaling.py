"""Scales of channels that move size from activations into the weights that read them."""

from __future__ import annotations

from torch import Tensor

from resq_compiler.numerics.quantized import FLT_MIN

LEAST = 1e-5  # of sizes: channels that were never seen keep a finite scale


def smooth_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factors of channels: values are divided by them, the columns of weights that read them multiplied. float64 [width].

    s = max|x|^alpha / max|W|^(1 - alpha). activations, weights: largest magnitudes of each channel and each column, [width].
    Source: SmoothQuant, arXiv 2211.10438, equation 4.
    """
    x, w = (t.double().clamp_min(LEAST) for t in (activations, weights))
    return (x**alpha / w ** (1 - alpha)).clamp_min(LEAST)


def salience_scales(means: Tensor, power: float) -> Tensor:
    """Factors of channels from their mean magnitude [width]: means^power, centred so that the largest and the smallest are inverses.

    Source: AWQ, arXiv 2306.00978, equation 5; the centring as its authors' program does it.
    """
    s = means.double().clamp_min(FLT_MIN) ** power
    return (s / (s.max() * s.min()).sqrt().clamp_min(FLT_MIN)).clamp_min(1e-4)
