"""Every emitter of an aten operator that moves values, and the arithmetic of dynamic sizes."""

from __future__ import annotations

import operator

import pytest
import torch
from resq_compiler.backends.onnx import emit_shapes
from resq_compiler.backends.onnx.registry import EMITTERS

from resq_compiler.errors import BackendError
from resq_compiler.ir.graph_tools import aten
from tests.backends.onnx.graphs import check, check_call

torch.manual_seed(0)
X = torch.randn(2, 3, 4, 6)
COUNTS = torch.tensor([[1, 0, 1], [1, 1, 1]])
CASES = {
    aten.view.default: [(X, [2, 12, 6]), (X, [6, -1])],
    aten.reshape.default: [(X, [2, 3, 24]), (X, [-1])],
    aten.flatten.using_ints: [(X,), (X, 1, 2), (X, -2), (X, 0, 1)],
    aten.unflatten.int: [(X, 3, [2, 3]), (X, -2, [2, -1]), (X, 0, [1, 2])],
    aten.unsqueeze.default: [(X, 0), (X, -1), (X, 2)],
    aten.squeeze.dim: [(X[:, :1], 1), (X, 1), (X[..., :1], -1)],
    aten.squeeze.default: [(X,), (X[:, :1, :, :1],)],
    aten.transpose.int: [(X, 1, 2), (X, -1, 0)],
    aten.permute.default: [(X, [0, 2, 1, 3]), (X, [-1, 0, 1, 2])],
    aten.slice.Tensor: [(X,), (X, 3, 0, 2), (X, -1, 1, 2**63 - 1, 2), (X, 2, -3, -1), (X, 1, None, 2), (X > 0, 3, 2)],
    aten.select.int: [(X, 1, 0), (X, -1, -2)],
    aten.cat.default: [([X, X[..., :2]], -1), ([X, X], 1), ([X, X],), ([COUNTS, COUNTS.float()], 1)],
    aten.concat.default: [([X, X[..., :2]], -1)],
    aten.stack.default: [([X, X + 1], -1), ([X, X, X], 0), ([X, X],)],
    aten.expand.default: [(X[:1], [2, -1, -1, -1]), (X[0, :, :1], [2, 3, 4, 6])],
    aten.repeat.default: [(X, [1, 2, 1, 3]), (X[0, 0], [2, 1, 1])],
    aten.repeat_interleave.self_int: [(X, 2, 3), (X, 3, -1), (X, 2, 0), (X, 2, 1)],
    aten.index_select.default: [(X, 3, torch.tensor([5, 0, 0])), (X, -3, torch.tensor([1]))],
    aten.gather.default: [(X, 1, torch.zeros(2, 2, 4, 6, dtype=torch.int64)), (COUNTS, -1, torch.tensor([[2, 0], [1, 1]]))],
    aten.index.Tensor: [
        (X, [COUNTS]), (X, [None, None, torch.tensor([-2])]), (X, [torch.tensor([[0], [1]]), torch.tensor([2, 0])]),
        (COUNTS > 0, [torch.tensor([0, 1])[:, None, None, None], torch.tensor([0, 1, 2])]),
    ],
    aten.cumsum.default: [(COUNTS, -1), (X, 0), (COUNTS > 0, 1)],
    aten.arange.default: [(5,), (3.5,)],
    aten.arange.start: [(2, 5), (-3, 1)],
    aten.arange.start_step: [(1, 8, 3)],
    aten.full.default: [([], 0.25), ([2, 3], -1)],
    aten.zeros.default: [([],), ([2, 1],)],
    aten.ones.default: [([3],)],
    aten.new_zeros.default: [(X, [2])],
    aten.new_ones.default: [(X, []), (X, [1, 2])],
}  # fmt: skip


@pytest.mark.parametrize("target", CASES, ids=str)
def test_operator(target):
    for case in CASES[target]:
        check_call(target, *case, tolerance=1e-6 if target is aten.cumsum.default else 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_types_that_are_asked_for(dtype):
    check_call(aten.arange.start, 1, 5, dtype=dtype)
    check_call(aten.full.default, [2], 3, dtype=dtype)
    check_call(aten.new_ones.default, COUNTS, [], dtype=torch.bool)


PIECES = [
    (aten.split.Tensor, (2, -1), 3), (aten.split.Tensor, (4, 3), 2), (aten.split_with_sizes.default, ([1, 5], 3), 2),
    (aten.chunk.default, (3, -1), 3),
]  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("target", "arguments", "count"), PIECES)
def test_pieces(target, arguments, count, last):
    def build(graph, x):
        return graph.call(operator.getitem, graph.call(target, x, *arguments), count - 1 if last else 0)

    check({"x": X}, build, tolerance=0)


def test_a_split_of_an_axis_whose_length_may_change_is_refused():
    with pytest.raises(BackendError, match="only the last axis can be split"):
        check({"x": X}, lambda graph, x: graph.call(operator.getitem, graph.call(aten.split.Tensor, x, 1, 1), 0))


def test_getitem_of_something_else():
    with pytest.raises(BackendError, match="expected one of the pieces of a split"):
        check_call(operator.getitem, X, 0)


def test_indices_without_an_onnx_form():
    with pytest.raises(BackendError, match="indices of axes apart"):
        check_call(aten.index.Tensor, X, [None, torch.tensor([0]), None, torch.tensor([0])])


@pytest.mark.parametrize("target", emit_shapes.SIZES, ids=lambda t: t.__name__)
def test_sizes_are_computed_from_the_input(target):
    """arange(size op size), (size op number) and (number op size)."""
    for pair in ((0, 1), (0, 2), (3, 0)):

        def build(graph, x):
            sizes = graph.call(aten.sym_size.int, x, 3), graph.call(aten.sym_size.int, x, -3), 2, 9
            return graph.call(aten.arange.default, graph.call(target, *(sizes[i] for i in pair)))  # noqa: B023

        check({"x": X}, build)


def test_one_graph_serves_other_sizes():
    """Nothing of the example's sizes is in the graph where axes are dynamic."""

    def build(graph, x):
        new = graph.call(aten.sym_size.int, x, 1)
        padded = graph.call(aten.expand.default, graph.call(aten.unsqueeze.default, x, 0), [2, -1, new, 6])
        repeated = graph.call(aten.repeat_interleave.self_int, graph.call(aten.flatten.using_ints, padded, 0, 1), 2, 1)
        return graph.call(aten.slice.Tensor, repeated, 1, 1, new)

    lowered = check({"x": X[0, :, 0][None].repeat(3, 1, 1)}, build, tolerance=0)
    other = torch.randn(4, 5, 6)
    lowered.inputs = {"x": other}
    (got,) = lowered.run(lowered.low.exact(lowered.result))[1]
    assert torch.equal(torch.from_numpy(got), other.repeat(2, 1, 1).repeat_interleave(2, 1)[:, 1:5])


def test_every_emitter_of_this_module_is_tested():
    tested = {*CASES, *emit_shapes.SIZES, aten.sym_size.int, operator.getitem}
    tested |= {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
    assert tested == {target for target, emitter in EMITTERS.items() if emitter.__module__ == emit_shapes.__name__}
