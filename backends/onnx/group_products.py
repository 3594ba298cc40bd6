"""Integer products of inputs that have a scale for each group of columns: one for every group, exact as those of form_integer.py.

    Σ_g scale_g scale_w Σ_{k in g} (u_k - z_g) w_k

Weights lie whole on disk and are cut when the model is loaded. ONNX Runtime fuses every product as it does those of whole rows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.integer_weights import (
    StackedCodes,
    correction_count,
    correction_rows,
    stacked_scales,
    stored_codes,
    stored_zero,
)
from resq_compiler.backends.onnx.plan import Plan, Term
from resq_compiler.backends.onnx.values import Codes
from torch.fx import Node

from resq_compiler.ir.views import MergeHeads, Quantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering

log = logging.getLogger("resq_compiler")


def cut_inputs(plan: Plan) -> set[Node]:
    """quantize nodes whose groups are columns and not heads, where no weights that read them have groups of their own."""
    found: set[Node] = set()
    for source, terms in plan.terms_of.items():
        quantizer = Quantize.of(source)
        if quantizer is not None and quantizer.groups > 1 and MergeHeads.of(quantizer.x) is None:
            found |= {source} if all(term.group_size is None for term in terms) else set()
    return found


def tell_cut(plan: Plan, cut: set[Node]) -> None:
    """Warn where products become several: with four groups each SmolLM2's prompts take nearly twice as long."""
    groups = {source: quantizer.groups for source in cut if (quantizer := Quantize.of(source)) is not None}
    several = [root.name for root, members in plan.groups.items() if cut & set(members[0].sources)]
    if several:
        log.warning(
            "onnx: %d of %d linears (%s, ...) take a product for each of up to %d groups of columns, which is slower; for one product each "
            "compile with activation_group_size=none",
            len(several), len(plan.groups), several[0], max(groups.values()),
        )  # fmt: skip


def group_product(low: Lowering, source: Codes, terms: list[Term]) -> str:
    """float32 [B, S, N] of codes [B, S, G, K/G]."""
    b, groups = low.b, source.groups
    rows = correction_count(low.plan.terms_of[terms[0].source], groups)
    padded = low.once(("padded", source.codes), lambda: with_zero_points(low, source, rows))
    zero, total = b.constant(np.uint8(stored_zero(source.bits))), ""
    for codes, weight, scales, scale in zip(
        b.split(padded, [1] * groups, axis=2),
        group_weights(low, terms, groups, rows),
        copies(low, stacked_scales(b, terms), StackedCodes(tuple(terms)).dims[1], groups),
        b.split(source.scale, [1] * groups, axis=2),
        strict=True,
    ):
        accumulator = b.op("Cast", b.op("MatMulInteger", codes, weight, zero), to=TensorProto.FLOAT)
        product = b.op("Mul", b.op("Mul", accumulator, b.op("Mul", runtime_one(low), scales)), scale)
        total = b.op("Add", total, product) if total else product
    return b.op("Squeeze", total, b.ints(2))


def copies(low: Lowering, vector: str, width: int, count: int) -> list[str]:
    """The vector `count` times, made when the model is loaded: ONNX Runtime fuses no product whose scale another one reads."""
    return low.b.split(low.b.op("Tile", vector, low.b.ints(count)), [width] * count)


def runtime_one(low: Lowering) -> str:
    """1.0, [1], known only at run time, in the place of the scale of the rows: ONNX Runtime fuses products whose scale is a product of
    two. Scales of rows inside the fused operator are multiplied by one thread, after the product; a Mul runs in all threads."""

    def make() -> str:
        size = low.size("input_ids", 1)
        return low.b.op("Cast", low.b.op("Equal", size, size), to=TensorProto.FLOAT)

    return low.once("one", make)


def with_zero_points(low: Lowering, source: Codes, rows: int) -> str:
    """Codes with the zero point of their group in `rows` columns behind them."""
    if rows == 0:
        return source.codes
    repeated = low.b.op("Expand", source.zero_point, low.b.ints(1, 1, 1, rows))
    return low.b.op("Concat", source.codes, repeated, axis=-1)


def group_weights(low: Lowering, terms: list[Term], groups: int, rows: int) -> list[str]:
    """int8 [K/G + rows, N] of every group, correction rows last."""
    b, name, codes = low.b, terms[0].name, StackedCodes(tuple(terms))
    stored = stored_codes(b, codes.pieces, codes.dims, codes.bits, name)
    whole = b.op("Cast", stored, to=TensorProto.INT8) if codes.bits <= 4 else stored
    cut = np.split(codes.make(), groups)
    weights = b.split(whole, [len(cut[0])] * groups, axis=0)
    if rows == 0:
        return weights
    extra = [b.constant(correction_rows(c, rows), name=f"{name}.correction.{g}") for g, c in enumerate(cut)]
    return [b.join(pair, axis=0) for pair in zip(weights, extra, strict=True)]
