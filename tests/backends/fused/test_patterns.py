"""What the lowering recognises, and the near misses it names, on small graphs."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused import patterns
from resq_compiler.backends.fused.formats import InputPart
from torch.fx import Graph, Node

from resq_compiler.ir import ops
from resq_compiler.ir.views import Norm, Quantize

aten = torch.ops.aten


class Build:
    """A graph whose nodes know their shapes."""

    def __init__(self):
        self.graph = Graph()

    def input(self, *shape: int) -> Node:
        return self._shaped(self.graph.placeholder("x"), shape)

    def tensor(self, *shape: int) -> Node:
        """A tensor of the model."""
        return self._shaped(self.graph.create_node("get_attr", "tensor"), shape)

    def _shaped(self, node: Node, shape: tuple[int, ...]) -> Node:
        node.meta["val"] = torch.empty(shape, device="meta")
        return node

    def call(self, target, *args) -> Node:
        node = self.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*values)
        return node

    def quantizers(self, *nodes: tuple) -> patterns.Inputs:
        """Of each (x, bits, ...)."""
        return tuple(Quantize.require(self.call(ops.quantize, *arguments)) for arguments in nodes)


@pytest.fixture
def build() -> Build:
    return Build()


def test_a_quantizer(build):
    x = build.input(2, 5, 64)
    (one,) = build.quantizers((x, 4, 4, 0.9))
    assert one.x is x and one.clip == 0.9 and patterns.part_of(one) == InputPart(4, 16, 4)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [((4, 8), [(4, 8)]), ((2, 4, 8), [(2,), (4, 8)]), ((4,), [(4,)]), ((2, 4), [(2,), (4,)]), ((5, 8), [(5,), (8,)])],
    ids=str,
)
def test_parts_of_one_operator(bits, expected):
    assert [tuple(part.bits for part in parts) for parts in patterns.calls([InputPart(b, 8) for b in bits])] == expected


def two_columns(build, x, edges=((0, 56), (56, 64))):
    return build.quantizers(
        *((build.call(ops.columns, x, *edge), bits) for edge, bits in zip(edges, (4, 8), strict=True))
    )


def test_a_norm_read_by_all_quantizers_is_theirs(build):
    x = build.input(2, 5, 64)
    norm = build.call(ops.rms_norm, x, None, 1e-6)
    inputs = two_columns(build, norm)
    source = patterns.common_source(inputs)
    assert source.x is norm and source.norm() == Norm(norm, x, None, None, 1e-6)


def test_a_layer_norm_too(build):
    x, weight = build.input(2, 5, 64), build.tensor(64)
    norm = build.call(aten.layer_norm.default, x, [64], weight)
    inputs = build.quantizers((norm, 8))
    assert patterns.common_source(inputs).norm() == Norm(norm, x, weight, None, 1e-5)
    over_two = build.quantizers((build.call(aten.layer_norm.default, x, [5, 64]), 8))
    assert patterns.common_source(over_two).norm() == "it is over more than the last dimension"


def test_near_misses_of_norms(build):
    norm = build.call(ops.rms_norm, build.input(2, 5, 64), None, 1e-6)
    inputs = two_columns(build, norm)
    other = build.call(aten.neg.default, norm)
    reason = patterns.common_source(inputs).norm()
    assert reason == f"others than the quantizers of one linear's input read it: {other.name}"
    plain = build.quantizers((build.input(2, 5, 64), 4))
    assert patterns.common_source(plain).norm() is None


@pytest.mark.parametrize("edges", [((0, 56), (48, 64)), ((8, 56), (56, 64)), ((0, 48), (48, 56))], ids=str)
def test_columns_with_gaps_have_no_common_source(edges, build):
    assert patterns.common_source(two_columns(build, build.input(2, 5, 64), edges)) is None


def test_columns_of_different_values_have_no_common_source(build):
    pieces = [build.call(ops.columns, build.input(2, 5, 64), *edge) for edge in ((0, 56), (56, 64))]
    assert patterns.common_source(build.quantizers((pieces[0], 4), (pieces[1], 8))) is None


def test_gated_activations(build):
    gate, up, one = build.input(2, 160), build.input(2, 160), build.input(1)
    silu = build.call(aten.silu.default, gate)
    assert patterns.gated(build.call(aten.mul.Tensor, silu, up)) == (gate, up, "silu")
    assert patterns.gated(build.call(aten.mul.Tensor, up, silu)) == (gate, up, "silu")
    assert patterns.gated(build.call(aten.gelu.default, gate)) == (gate, None, "gelu")
    scaled = build.call(aten.mul.Tensor, gate, one)
    assert patterns.gated(scaled) == (scaled, None, "none")


def test_stretches_of_a_transform(build):
    x = build.input(2, 64)
    whole = build.call(ops.hadamard, x, False)
    assert patterns.split_hadamard(build.quantizers((whole, 4))).node is whole
    split = build.call(ops.hadamard, x, True, (48, 16))
    assert patterns.split_hadamard(two_columns(build, split, ((0, 48), (48, 64)))).node is split
    assert patterns.split_hadamard(build.quantizers((x, 4))) is None


def test_near_misses_of_transforms(build):
    x = build.input(2, 64)
    one = two_columns(build, build.call(ops.hadamard, x, False), ((0, 48), (48, 64)))
    assert patterns.split_hadamard(one) == "its stretches [64] are not those that are quantized, [48, 16]"
    read_twice = build.call(ops.hadamard, x, False)
    inputs = build.quantizers((read_twice, 4))
    build.call(aten.neg.default, read_twice)
    assert patterns.split_hadamard(inputs) == "others than the quantizers of one linear's input read it"


def walked_back(build, q, k):
    """What attention, their only reader, would make of queries and keys."""
    for node in (q, k):
        build.call(aten.neg.default, node)
    return patterns.turned(q, k)


def heads(build):
    q, k = build.input(2, 4, 5, 16), build.input(2, 2, 5, 16)
    cos, sin, u = build.input(2, 1, 5, 16), build.input(2, 1, 5, 16), build.tensor(16, 16)
    return q, k, cos, sin, u


def test_queries_and_keys_are_walked_back(build):
    q, k, cos, sin, u = heads(build)
    weights = build.tensor(16), build.tensor(16)
    normed = [build.call(ops.rms_norm, x, w, 1e-6) for x, w in zip((q, k), weights, strict=True)]
    rotated = [build.call(ops.rope, x, cos, sin) for x in normed]
    turned = walked_back(build, *(build.call(ops.project, x, u) for x in rotated))
    assert turned == patterns.Turned(q, k, u, (cos, sin), *weights, 1e-6)


def test_as_far_as_they_agree(build):
    q, k, cos, sin, u = heads(build)
    other = build.tensor(16, 16)
    rotated = [build.call(ops.rope, x, cos, sin) for x in (q, k)]
    apart = build.call(ops.project, rotated[0], u), build.call(ops.project, rotated[1], other)
    assert walked_back(build, *apart) == patterns.Turned(*apart)
    undone = [build.call(ops.project, x, u, True) for x in (q, k)]
    assert walked_back(build, *undone) == patterns.Turned(*undone)


def test_sides_of_a_cache(build):
    past, new = build.input(2, 2, 7, 16), build.input(2, 2, 5, 16)
    image = build.call(ops.quantize_dequantize, new, ((4, 0, 14), (8, 14, 16)), 0.9)
    side = patterns.CacheSide.of(build.call(ops.append_cache, past, image), [past])
    assert side == patterns.CacheSide(past, new, ((4, 0, 14), (8, 14, 16)), 0.9)
    assert "not append_cache" in patterns.CacheSide.of(image, [past])
    assert "not quantized (kv_bits of 16)" in patterns.CacheSide.of(build.call(ops.append_cache, past, new), [past])
