"""Small standard nodes become operators that can be steps of a chain, if they have the usual form."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from resq_compiler.backends.onnx.builder import GraphBuilder
from resq_compiler.backends.onnx.small_nodes import joined


def graph():
    b = GraphBuilder(21)
    for name in ("input_ids", "attention_mask", "position_ids"):
        b.input(name, TensorProto.INT64, ("batch", "sequence"))
    return b


def seen(b, mask="attention_mask", zero=0):
    return b.op("Not", b.op("Equal", mask, b.constant(np.int64(zero))))


def angles(b, positions="position_ids", axis=2, dtype=np.float32, twice=True):
    column = b.op("Cast", b.op("Unsqueeze", positions, b.ints(axis)), to=TensorProto.FLOAT)
    product = b.op("Mul", column, b.constant(np.ones(4, dtype)))
    return b.op("Concat", product, product if twice else column, axis=-1)


def embedding(b, ids="input_ids", dtype=np.int8, axis=0):
    codes, scale = b.constant(np.ones((9, 4), dtype)), b.constant(np.ones((9, 1), np.float32))
    rows = b.op("Cast", b.op("Gather", codes, ids, axis=axis), to=TensorProto.FLOAT)
    return b.op("Mul", rows, b.op("Gather", scale, ids, axis=axis))


def kinds(b, output):
    b.nodes = joined(b)
    b.output(output, TensorProto.FLOAT, ("a",))
    return [(n.op_type, list(n.input)) for n in b.needed()[0]]


USUAL = [(seen, "Seen", "attention_mask"), (angles, "Angles", "position_ids"), (embedding, "Embed", "input_ids")]


@pytest.mark.parametrize(("make", "kind", "first"), USUAL)
def test_usual_forms(make, kind, first):
    b = graph()
    ((found, inputs),) = kinds(b, make(b))
    assert found == kind and inputs[0] == first


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (seen, dict(mask="position_ids")), (seen, dict(zero=1)),
        (angles, dict(positions="input_ids")), (angles, dict(axis=1)), (angles, dict(dtype=np.float64)), (angles, dict(twice=False)),
        (embedding, dict(ids="position_ids")), (embedding, dict(dtype=np.uint8)), (embedding, dict(axis=1)),
    ],
)  # fmt: skip
def test_other_forms_stay(make, options):
    b = graph()
    before = make(b, **options)
    names = [n.op_type for n in b.nodes]
    assert [kind for kind, _ in kinds(b, before)] == names


@pytest.mark.parametrize(("axes", "left"), [((1, 1), 1), ((1, 2), 3), ((-1, -1), 3)])
def test_an_axis_that_comes_and_goes(axes, left):
    b = graph()
    column = b.op("Unsqueeze", "position_ids", b.ints(axes[0]))
    assert len(kinds(b, b.op("Cos", b.op("Squeeze", column, b.ints(axes[1]))))) == left
