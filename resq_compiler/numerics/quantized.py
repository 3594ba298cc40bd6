"""The integer semantics of resq_compiler: how activations become codes, and what a linear over codes computes.

This file is the law that every backend reproduces. Codes are signed int8 at every width b in 2..8:
q in [-2^(b-1), 2^(b-1)-1]. Activations and KV: asymmetric, dynamic, per token, one scale and zero-point for each group:

    lo = min(x, 0) * clip          hi = max(x, 0) * clip          (over the group, float32)
    scale = max((hi - lo) / (2^b - 1), FLT_MIN)                   zero_point = rint(-lo / scale) - 2^(b-1)
    q = clamp(rint(x / scale) + zero_point, qmin, qmax)           x ~ (q - zero_point) * scale

rint rounds halves to even; divisions are IEEE. Inputs must be finite, with hi - lo inside float32 (calibration checks
it; a check here would read data back on every call). No function here is differentiable: inputs are detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from resq_compiler.errors import QuantError

FLT_MIN = torch.finfo(torch.float32).tiny
MAX_EXACT_WIDTH = (2**31 - 1) // (255 * 128)
"""Largest in_features (65793) whose int32 accumulator cannot overflow: |q - zp| <= 255, |qw| <= 128 at 8 bits."""

_ROWS_PER_CHUNK = 512  # keeps accumulators near the CPU's caches: 8-bit parts with many outputs run 1.4x faster
IMAGE_AT_A_TIME = 2**24  # numbers, 64 MB in float32


@dataclass(frozen=True)
class QuantSpec:
    """Width and symmetry of a code. Both kinds use the signed range; `levels` is how many steps the scale spans."""

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise QuantError(f"QuantSpec: bits must be an integer in 2..8, got {self.bits!r}")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def levels(self) -> int:
        return self.qmax if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class Part:
    """Columns [start, stop) of a linear's input, all at the same number of bits."""

    bits: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        QuantSpec(self.bits)
        if not 0 <= self.start < self.stop:
            raise QuantError(f"Part: need 0 <= start < stop, got start={self.start}, stop={self.stop}")

    @property
    def width(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class QuantizedActivation:
    """x ~ (qdata - zero_point) * scale, G groups of K/G columns. A pytree node: FX, fake tensors and export see inside.

    qdata: int8 [..., K].    scale: float32 [..., G].    zero_point: int32 [..., G], in the code range.    bits: 2..8.
    The constructor checks nothing, because pytree rebuilds nodes with placeholders in place of tensors.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def groups(self) -> int:
        return self.scale.shape[-1]


_FIELDS = ("qdata", "scale", "zero_point")
pytree.register_pytree_node(
    QuantizedActivation,
    lambda xq: ([xq.qdata, xq.scale, xq.zero_point], xq.bits),
    lambda children, bits: QuantizedActivation(**dict(zip(_FIELDS, children, strict=True)), bits=bits),
    serialized_type_name="resq_compiler.QuantizedActivation",
    flatten_with_keys_fn=lambda xq: ([(pytree.GetAttrKey(name), getattr(xq, name)) for name in _FIELDS], xq.bits),
)


def parts_for(
    width: int,
    high_fraction: float,
    *,
    low_bits: int = 4,
    high_bits: int = 8,
    lowest_fraction: float = 0.0,
    lowest_bits: int = 2,
    rank_multiple: int = 1,
) -> tuple[Part, ...]:
    """Split `width` columns into parts of ascending bits: [lowest | low | high], empty parts left out.

    A part of fraction f gets floor(width * f) columns, the paper's int(d * fraction), then rounded to the nearest
    multiple of `rank_multiple` (halves up, at least one multiple). `low` takes what is left.
    576 columns and 1/8 give (4, 0, 504), (8, 504, 576).

    Raises: QuantError: fractions outside [0, 1] or together above 1; a positive fraction that gives no column or more
            than there are; bits that descend.
    Source: ResQ (arXiv 2412.14363) section 3; three parts as its `low_fraction` option.
    """
    high = _rank(width, high_fraction, rank_multiple, "high_fraction")
    lowest = _rank(width, lowest_fraction, rank_multiple, "lowest_fraction")
    low = width - high - lowest
    if low < 0:
        raise QuantError(
            f"parts_for: {lowest} lowest + {high} high columns exceed width {width}; lower a fraction or rank_multiple"
        )
    parts, start = [], 0
    for bits, count in ((lowest_bits, lowest), (low_bits, low), (high_bits, high)):
        if count:
            parts.append(Part(bits, start, start + count))
            start += count
    check_parts(parts, width)
    return tuple(parts)


def _rank(width: int, fraction: float, multiple: int, name: str) -> int:
    if not 0 <= fraction <= 1 or width < 1 or multiple < 1:
        raise QuantError(
            f"parts_for: need 0 <= {name} <= 1, width >= 1, rank_multiple >= 1; got {fraction}, {width}, {multiple}"
        )
    count = int(width * fraction)
    if fraction == 0 or count == width:
        return count
    if count == 0:
        raise QuantError(
            f"parts_for: {name} {fraction} of {width} is less than one column; use 0 or at least {1 / width:.4g}"
        )
    return max((2 * count + multiple) // (2 * multiple), 1) * multiple


def check_parts(parts: Sequence[Part], width: int) -> None:
    """Raise QuantError unless `parts` cover columns 0..width without gaps, in bits that do not descend."""
    stops = [0, *(p.stop for p in parts)]
    contiguous = all(p.start == stop for p, stop in zip(parts, stops, strict=False))
    bits = [p.bits for p in parts]
    if not parts or not contiguous or stops[-1] != width or bits != sorted(bits):
        shown = [(p.bits, p.start, p.stop) for p in parts]
        raise QuantError(
            f"parts {shown} (bits, start, stop) must cover 0..{width} without gaps, in bits that do not descend; "
            "build them with parts_for"
        )


def quantize_activation(x: Tensor, bits: int, groups: int = 1, clip: float = 1.0) -> QuantizedActivation:
    """Quantize per token (and per group of columns), as the law at the top of this file.

    Args:    x: [..., K] floating point, computed in float32.    bits: 2..8.    groups: G, divides K.    clip: (0, 1].
    Returns: QuantizedActivation: qdata int8 [..., K], scale float32 [..., G], zero_point int32 [..., G].
    Raises:  QuantError: bits, groups or clip not usable, or x not floating point.
    Source:  ResQ's quantizer (asymmetric, range includes 0, integer zero-point); differs: codes are shifted to int8.
    """
    grouped = _group(x, bits, groups, clip)
    codes, scale, zero_point = _codes(grouped, bits, clip)
    return QuantizedActivation(codes.to(torch.int8).flatten(-2), scale.squeeze(-1), zero_point.squeeze(-1).int(), bits)


def quantize_static(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> QuantizedActivation:
    """The same codes with scales that are known before: for all tokens alike.

    Args:    x: [..., K] floating point.    scale: float32 [groups].    zero_point: int32 [groups], in the code range.
    Raises:  QuantError: groups that do not divide K, or x not floating point.
    """
    grouped, spec = _group(x, bits, len(scale), 1.0), QuantSpec(bits, symmetric=False)
    codes = (grouped / scale[:, None]).round_().add_(zero_point[:, None]).clamp_(spec.qmin, spec.qmax)
    each = (*x.shape[:-1], len(scale))
    return QuantizedActivation(codes.to(torch.int8).flatten(-2), scale.expand(each), zero_point.expand(each), bits)


def dequantize(xq: QuantizedActivation, dtype: torch.dtype = torch.float32) -> Tensor:
    """(qdata - zero_point) * scale, computed in float32. Returns [..., K] of `dtype`."""
    centred = xq.qdata.unflatten(-1, (xq.groups, -1)) - xq.zero_point.float().unsqueeze(-1)
    return centred.mul_(xq.scale.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize_dequantize(x: Tensor, parts: Sequence[Part | tuple[int, int, int]], clip: float = 1.0) -> Tensor:
    """The float image of the codes of x, part by part: bit for bit `dequantize(quantize_activation(...))` of each part.

    Args:    x: [..., K] floating point.    parts: (bits, start, stop) covering the K columns, a scale each.
             clip: (0, 1].
    Returns: [..., K], dtype of x (computed in float32, rounded once).
    Raises:  QuantError: parts do not cover K, or as quantize_activation.
    """
    checked = [p if isinstance(p, Part) else Part(*p) for p in parts]
    check_parts(checked, x.shape[-1])
    images = []
    for part in checked:
        piece = _group(x[..., part.start : part.stop], part.bits, 1, clip)
        codes, scale, zero_point = _codes(piece, part.bits, clip)
        images.append(codes.sub_(zero_point).mul_(scale).flatten(-2).to(x.dtype))
    return images[0] if len(images) == 1 else torch.cat(images, dim=-1)


def _group(x: Tensor, bits: int, groups: int, clip: float) -> Tensor:
    QuantSpec(bits, symmetric=False)
    if not x.is_floating_point():
        raise QuantError(f"quantize: expected a floating-point tensor, got {x.dtype} {tuple(x.shape)}")
    if not 0 < clip <= 1:
        raise QuantError(f"quantize: clip must be in (0, 1], got {clip}")
    if groups < 1 or x.shape[-1] % groups:
        raise QuantError(f"quantize: groups={groups} does not divide the last dimension {x.shape[-1]}")
    return x.detach().to(torch.float32).unflatten(-1, (groups, -1))


def _codes(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as float32 (a fresh tensor), scale and zero-point as float32 with a last dimension of 1."""
    spec = QuantSpec(bits, symmetric=False)
    # amin and amax are vectorised on CPU, aminmax is not (7x slower together)
    low = x.amin(-1, keepdim=True).clamp_(max=0).mul_(clip)
    high = x.amax(-1, keepdim=True).clamp_(min=0).mul_(clip)
    # a tensor divisor: CUDA turns division by a Python number into a product with its reciprocal
    scale = ((high - low) / torch.full_like(low, spec.levels)).clamp_(min=FLT_MIN)
    zero_point = low.neg_().div_(scale).round_().add_(spec.qmin)
    codes = (x / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return codes, scale, zero_point


def column_scales(scale: Tensor, width: int, group_size: int | None) -> Tensor:
    """Scales of weight codes [N, width] for each column: [N, 1] where a row has one, else [N, width] of its groups' [N, groups].

    Raises: QuantError: the scales are not those of so many groups.
    """
    if group_size is None:
        return scale[..., None]
    if scale.dim() < 2 or scale.shape[-1] != -(-width // group_size):
        raise QuantError(
            f"weight scales {tuple(scale.shape)}: expected {-(-width // group_size)} groups of {group_size} for {width} columns"
        )
    return scale.repeat_interleave(group_size, -1)[..., :width]


def weight_only_linear(x: Tensor, qdata: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    """Float x [..., K] times the float image of weight codes qdata int8 [N, K] at scales [N], or [N, groups]: [..., N] of x's dtype.

    Some rows of the image at a time: that of a vocabulary takes gigabytes.
    """
    rows = max(1, IMAGE_AT_A_TIME // qdata.shape[1])
    pieces = zip(qdata.split(rows), scale.split(rows), strict=True)
    found = [F.linear(x, (q * column_scales(s, q.shape[1], group_size)).to(x.dtype)) for q, s in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def integer_linear(
    xq: QuantizedActivation, qdata: Tensor, scale: Tensor, row_sum: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """Linear over one part, on codes.

        acc[n] = sum_k (qx[k] - zp) * qw[n, k]  (int32, exact)        y[n] = float32(acc[n]) * (sx * sw[n])

    With groups > 1 (one activation scale per head) y = sw * sum_g sx_g * acc_g; that sum is computed as a float32
    matrix product over (qx - zp) * sx_g: float32 rounding (1e-6 of the row's magnitude) instead of bit equality.
    With a group_size, columns of the weight have a scale for each group, and y = sx * sum_g sw_g * float32(acc_g), added in order.

    Args:    xq: [..., K].    qdata: int8 [N, K], |code| <= 128.    scale: float32 [N], or [N, groups].
             row_sum: int32 [N], sum_k qw, saved across calls; only 8-bit activations use it (narrower ones subtract
             the zero-point inside int8).
    Returns: float32 [..., N]. Bias and the other parts are added by the caller.
    Raises:  QuantError: shapes or dtypes disagree, or K above MAX_EXACT_WIDTH.
    """
    _check_linear(xq, qdata, scale if group_size is None else scale[:, 0])
    if xq.groups > 1:
        if group_size is not None:
            return F.linear(dequantize(xq), qdata * column_scales(scale, qdata.shape[1], group_size))
        return F.linear(dequantize(xq), qdata.float()).mul_(scale)
    if group_size is not None:
        return _grouped_product(xq, qdata, scale, group_size)
    codes, zero_point = xq.qdata.flatten(0, -2), xq.zero_point.flatten(0, -2)
    if xq.bits < 8:  # q - zp fits int8
        codes, correction = codes - zero_point.to(torch.int8), None
    else:
        correction = (zero_point, row_sums(qdata) if row_sum is None else row_sum)
    y = _scaled_product(codes, qdata, correction, xq.scale.flatten(0, -2), scale)
    return y.unflatten(0, xq.qdata.shape[:-1])


def row_sums(qdata: Tensor) -> Tensor:
    """Sums of the rows of codes int8 [N, K]: int32 [N]. As a product: `sum` makes an int32 image of all codes first, and takes ten times
    as long."""
    return _int_matmul(qdata.new_ones(1, qdata.shape[1]), qdata)[0]


def _grouped_product(xq: QuantizedActivation, qdata: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """sx * sum_g sw_g * float32(acc_g); scale [N, groups]."""
    total = torch.zeros(*xq.qdata.shape[:-1], len(qdata), device=qdata.device)
    for g, start in enumerate(range(0, qdata.shape[1], group_size)):
        here = slice(start, start + group_size)
        piece = QuantizedActivation(xq.qdata[..., here].contiguous(), torch.ones_like(xq.scale), xq.zero_point, xq.bits)
        total += integer_linear(piece, qdata[:, here].contiguous(), scale[:, g])
    return total.mul_(xq.scale)


def _scaled_product(
    codes: Tensor, qdata: Tensor, correction: tuple[Tensor, Tensor] | None, sx: Tensor, sw: Tensor
) -> Tensor:
    rows = codes.shape[0]
    if not isinstance(rows, int) or rows <= _ROWS_PER_CHUNK or codes.is_cuda:  # a symbolic size is never chunked
        return (sx * sw).mul_(_accumulate(codes, qdata, correction))
    y = torch.empty(rows, qdata.shape[0], dtype=torch.float32, device=codes.device)
    for start in range(0, rows, _ROWS_PER_CHUNK):
        here = slice(start, start + _ROWS_PER_CHUNK)
        part = None if correction is None else (correction[0][here], correction[1])
        torch.mul(sx[here], sw, out=y[here]).mul_(_accumulate(codes[here], qdata, part))
    return y


def _accumulate(codes: Tensor, qdata: Tensor, correction: tuple[Tensor, Tensor] | None) -> Tensor:
    acc = _int_matmul(codes, qdata)
    return acc if correction is None else acc.addcmul_(*correction, value=-1)


def _int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] = a [M, K] @ b [N, K].T, exact; pads where CUDA's kernel wants M > 16 and multiples of 8."""
    if not a.is_cuda:
        if b.shape[1] == 1:  # torch reads the wrong bytes of a column that is one wide
            a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
        return torch._int_mm(a, b.t())
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    a = F.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


def _check_linear(xq: QuantizedActivation, qdata: Tensor, scale: Tensor) -> None:
    k = xq.qdata.shape[-1]
    if qdata.dim() != 2 or qdata.shape[1] != k or scale.shape != qdata.shape[:1]:
        raise QuantError(
            f"integer_linear: activation has {k} columns, weight codes {tuple(qdata.shape)}, scale "
            f"{tuple(scale.shape)}; expected codes [N, {k}] and scale [N]"
        )
    if xq.qdata.dtype != torch.int8 or qdata.dtype != torch.int8:
        raise QuantError(f"integer_linear: codes must be int8, got {xq.qdata.dtype} and {qdata.dtype}; unpack first")
    if k > MAX_EXACT_WIDTH:
        raise QuantError(f"integer_linear: {k} columns can overflow int32, at most {MAX_EXACT_WIDTH}; split the part")
