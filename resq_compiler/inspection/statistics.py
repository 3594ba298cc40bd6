"""Numbers about the values at one site: range, shape of the distribution, outliers, and use of the quantization space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OUTLIER_SIZE, OUTLIER_LAYERS, OUTLIER_TOKENS = 6.0, 0.25, 0.06  # LLM.int8(), arXiv 2208.07339, section 4
MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0  # massive activations, arXiv 2402.17762, section 2
SPIKE_RATIO, SPIKE_SHARE = 100.0, 0.5  # a super weight: both spikes this far above the median, and half of the output's
MEDIAN_ROWS = 128  # 128 tokens of 576 channels are 74,000 values: the median is right to about 0.5 %
NORMAL_99 = 2.3263478740408408  # 99 % quantile of the normal distribution


@dataclass(frozen=True)
class SiteStatistics:
    """Of x [tokens, channels]. kurtosis: pooled over all values, 3 for a normal distribution. peaks, rms: of each channel.

    median: of |x| over at most MEDIAN_ROWS tokens, evenly spaced. moment: mean of x xᵀ over tokens, [channels, channels].
    qsur: quantization space utilization, the d-th root; None with fewer tokens than channels. outlier_tokens: [tokens,
    channels] bool, |x| at least OUTLIER_SIZE.
    """

    low: float
    high: float
    median: float
    kurtosis: float
    qsur: float | None
    peaks: Tensor
    rms: Tensor
    moment: Tensor
    outlier_tokens: Tensor

    @classmethod
    def of(cls, x: Tensor) -> SiteStatistics:
        """Statistics of x [..., channels]."""
        x = x.flatten(0, -2).float()
        low, high, mean = x.amin(0), x.amax(0), x.mean(0)
        covariance = (x - mean).T @ (x - mean) / x.shape[0]  # centred before the product, which is in float32
        moment = covariance + torch.outer(mean, mean)
        return cls(
            float(low.min()), float(high.max()), median_size(x), kurtosis(x), qsur(mean, covariance, x.shape[0]),
            torch.maximum(high, -low), moment.diagonal().sqrt(), moment, x.abs() >= OUTLIER_SIZE,
        )  # fmt: skip


def median_size(x: Tensor) -> float:
    """The median of |x| over at most MEDIAN_ROWS evenly spaced rows of x [tokens, channels]."""
    step = -(-x.shape[0] // MEDIAN_ROWS)
    return float(x[::step].abs().flatten().median())


def kurtosis(x: Tensor) -> float:
    """E[(x - mean)⁴] / variance² over all values."""
    squares = (x - x.mean()).square_()
    variance = float(squares.mean())
    return float(squares.square_().mean()) / variance**2 if variance > 0 else 0.0


def qsur(mean: Tensor, covariance: Tensor, tokens: int) -> float | None:
    """Quantization space utilization of x [tokens, d], its d-th root: (volume of the data / volume of the cube around it)^(1/d).

    The data is the 99 % ellipsoid of a normal distribution with the mean [d] and covariance [d, d] of x; the cube spans, in
    every dimension, from the least to the greatest end of that ellipsoid's axes-aligned box.
        log V_data = d/2 log(pi c) - lgamma(d/2 + 1) + 1/2 log det(S)        V_cube = (max_j(m + sqrt(c S_jj)) - min_j(m - ...))^d
    with c the 99 % quantile of chi-square with d degrees of freedom (Wilson-Hilferty).

    Returns: a number in (0, 1), larger = better used; None where the covariance is singular (tokens <= d, dead channels).
    Source:  OSTQuant, arXiv 2501.13987, section 3; differs: the box's ends instead of the principal axes' ends.
    """
    d = len(mean)
    if tokens <= d:
        return None
    mean, covariance = mean.double(), covariance.double()
    sign, log_determinant = torch.linalg.slogdet(covariance)
    if sign <= 0 or not math.isfinite(float(log_determinant)):
        return None
    c = d * (1 - 2 / (9 * d) + NORMAL_99 * math.sqrt(2 / (9 * d))) ** 3
    reach = (c * covariance.diagonal()).sqrt()
    side = float((mean + reach).max() - (mean - reach).min())
    log_data = d / 2 * math.log(math.pi * c) - math.lgamma(d / 2 + 1) + 0.5 * float(log_determinant)
    return math.exp(log_data / d - math.log(side))


def outlier_channels(layers: list[Tensor]) -> list[dict[str, float]]:
    """Channels with |x| >= 6 in at least 25 % of layers and at 6 % of tokens or more (those where any layer shows it).

    layers: outlier_tokens [tokens, channels] of the same kind of site in every layer. Source: LLM.int8(), section 4.
    """
    shown = torch.stack([layer.any(0) for layer in layers])  # [layers, channels]
    tokens = torch.stack(layers).any(0)  # [tokens, channels]
    in_layers, at_tokens = shown.float().mean(0), tokens.float().mean(0)
    found = ((in_layers >= OUTLIER_LAYERS) & (at_tokens >= OUTLIER_TOKENS)).nonzero().flatten()
    return [{"channel": int(c), "layers": float(in_layers[c]), "tokens": float(at_tokens[c])} for c in found]


def massive_values(x: Tensor, median: float, limit: int = 5) -> list[tuple[int, int, float]]:
    """(token, channel, value) of values above 100 and above 1000 times the median size, largest first."""
    rows = x.flatten(0, -2)
    size = rows.abs()
    found = ((size > MASSIVE_SIZE) & (size > MASSIVE_RATIO * median)).nonzero()
    order = size[found[:, 0], found[:, 1]].argsort(descending=True, stable=True)[:limit]
    return [(int(t), int(c), float(rows[t, c])) for t, c in found[order]]


def super_weight(x: Tensor, y: Tensor, weight: Tensor) -> dict[str, float] | None:
    """The weight that turns a spike of a down projection's input into one of its output, or None.

    x [..., K] input, y [..., N] output, weight [N, K]. The largest output y[t, n] and the largest input x[t, k] of that token
    must both stand SPIKE_RATIO above their median size, and x[t, k] · weight[n, k] make at least half of y[t, n].
    Source: The Super Weight, arXiv 2411.07191, section 3; thresholds are ours.
    """
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    t, n = divmod(int(y.abs().argmax()), y.shape[1])
    k = int(x[t].abs().argmax())
    spikes = [float(v[i].abs() / v.abs().flatten().median().clamp_min(1e-30)) for v, i in ((x, (t, k)), (y, (t, n)))]
    share = float(x[t, k] * weight[n, k] / y[t, n])
    if min(spikes) < SPIKE_RATIO or share < SPIKE_SHARE:
        return None
    return {
        "row": n, "column": k, "weight": float(weight[n, k]), "input": float(x[t, k]), "output": float(y[t, n]), "share": share, "token": t,
    }  # fmt: skip
