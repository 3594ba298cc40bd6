"""The library as ONNX Runtime custom operators: the same bytes as the kernels called directly, in the same shapes; errors name the node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.attention import attention, empty_cache, rope_cache
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import CodePart, hadamard_quantize, mixed_linear, norm_quantize, pack_linear

from resq_compiler.numerics.hadamard import hadamard_plan
from resq_compiler.numerics.hadamard_orders import is_power_of_two

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

LOW, HIGH = CodePart(4, 56), CodePart(8, 8)
HEAD = CachedHead(56, 8)
HEAD_ATTRIBUTES = dict(
    low_width=56, high_width=8, value_low_width=56, value_high_width=8, heads=4, kv_heads=2, low_clip=1.0, high_clip=1.0
)


class Node:
    """A session of one node; None is an absent optional input."""

    def __init__(self, library, op, inputs, outputs, **attributes):
        present = {f"in{i}": x.numpy() for i, x in enumerate(inputs) if x is not None}
        names = ["" if x is None else f"in{i}" for i, x in enumerate(inputs)]
        made = [f"out{i}" for i in range(outputs)]
        node = onnx.helper.make_node(op, names, made, name="the_node", domain="resq", **attributes)
        kind = onnx.helper.np_dtype_to_tensor_dtype
        given = [onnx.helper.make_tensor_value_info(n, kind(x.dtype), [None] * x.ndim) for n, x in present.items()]
        results = [onnx.helper.make_empty_tensor_value_info(name) for name in made]
        graph = onnx.helper.make_graph([node], "g", given, results)
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("resq", 1)]
        )
        model.ir_version = 10
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library.path))
        options.intra_op_num_threads = 2
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.feeds = present

    def run(self):
        return [torch.from_numpy(np.asarray(x)) for x in self.session.run(None, self.feeds)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_codes(got, expected, lead):
    low, high, scale, zero_point = got
    for rows, part in zip(expected.rows, (low, high), strict=True):
        assert part.shape[:-1] == lead and torch.equal(part.flatten(0, -2), rows)
    assert torch.equal(scale.flatten(0, -2), expected.scale) and torch.equal(
        zero_point.flatten(0, -2), expected.zero_point
    )


@pytest.mark.parametrize("rows", [1, 37])
def test_norm_quantize(library, rows):
    x, weight = random(2, rows, 64), random(64, seed=1)
    node = Node(
        library, "NormQuantize", [x, weight], 4, norm=1, epsilon=1e-5, low_width=56, high_width=8, high_clip=0.9
    )
    expected = norm_quantize(library, x.flatten(0, 1), [LOW, CodePart(8, 8, 1, 0.9)], "rms", weight, None, 1e-5)
    assert_codes(node.run(), expected, (2, rows))


def test_norm_quantize_in_one_part(library):
    x = random(1, 3, 40)
    low, high, *_ = Node(library, "NormQuantize", [x], 4, low_width=40).run()
    assert torch.equal(low[0], norm_quantize(library, x[0], [CodePart(4, 40)]).rows[0]) and high.shape == (1, 3, 0)


@pytest.mark.parametrize("rows", [1, 200])
def test_mixed_linear(library, rows):
    x = norm_quantize(library, random(rows, 64), [LOW, HIGH])
    codes = [torch.randint(-8, 8, (130, 56), dtype=torch.int8), torch.randint(-128, 128, (130, 8), dtype=torch.int8)]
    weight = pack_linear([(codes[0], torch.rand(130), 4), (codes[1], torch.rand(130), 8)], (1, 1), (4, 8))
    bias, residual = random(130), random(1, rows, 130)
    operands = [
        x.rows[0][None],
        x.rows[1][None],
        x.scale[None],
        x.zero_point[None],
        *weight.tiles,
        weight.scale,
        weight.row_sum,
    ]
    for extra in ([], [bias], [None, residual], [bias, residual]):
        node = Node(library, "MixedLinear", operands + extra, 1, low_width=56, high_width=8)
        given = [t if t is None or t.dim() == 1 else t[0] for t in extra]
        assert torch.equal(node.run()[0], mixed_linear(library, x, weight, *given)[None])


@pytest.mark.parametrize("n", [48, 64, 280])
@pytest.mark.parametrize("stacked", [0, 1])
def test_hadamard_quantize(library, n, stacked):
    plan, gate, up = hadamard_plan(n), random(2, 5, n), random(2, 5, n, seed=1)
    dense = [
        f.float().flatten() for f, order in zip(plan.factors, plan.orders, strict=True) if not is_power_of_two(order)
    ]
    orders = {f"high_order{i}": order for i, order in enumerate(plan.orders)} | {"high_blocks": plan.blocks}
    inputs = [torch.cat((gate, up), -1), None] if stacked else [gate, up]
    inputs = [*inputs, torch.cat(dense)] if dense else inputs
    node = Node(library, "HadamardQuantize", inputs, 4, activation=1, stacked=stacked, high_width=n, **orders)
    expected = hadamard_quantize(library, gate.flatten(0, 1), up.flatten(0, 1), [CodePart(8, n)], "silu")
    low, high, scale, zero_point = node.run()
    assert low.shape == (2, 5, 0) and torch.equal(high.flatten(0, 1), expected.rows[0])
    assert torch.equal(scale.flatten(0, 1), expected.scale) and torch.equal(
        zero_point.flatten(0, 1), expected.zero_point
    )


@pytest.mark.parametrize("groups", [(6, 6), (6, 1)])
def test_hadamard_quantize_in_groups(library, groups):
    plans = [hadamard_plan(n) for n in (168, 24)]
    gate, up = random(2, 5, 192), random(2, 5, 192, seed=1)
    dense, attributes = [], dict(activation=1, low_groups=groups[0], high_groups=groups[1])
    attributes |= dict(low_width=168 // groups[0], high_width=24 // groups[1])
    for side, plan in zip(("low", "high"), plans, strict=True):
        attributes |= {f"{side}_order{i}": order for i, order in enumerate(plan.orders)} | {
            f"{side}_blocks": plan.blocks
        }
        dense += [f.float().flatten() for f, n in zip(plan.factors, plan.orders, strict=True) if not is_power_of_two(n)]
    node = Node(library, "HadamardQuantize", [gate, up, torch.cat(dense)], 4, **attributes)
    parts = [CodePart(4, 168 // groups[0], groups[0]), CodePart(8, 24 // groups[1], groups[1])]
    expected = hadamard_quantize(library, gate.flatten(0, 1), up.flatten(0, 1), parts, "silu")
    found = [t.flatten(0, 1) for t in node.run()]
    wanted = (*expected.rows, expected.scale, expected.zero_point)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def linear_operands(groups=1):
    """Weights, bias and residual of a linear of 130 channels, as a node takes them."""
    codes = [
        torch.randint(-8, 8, (130, 56 * groups), dtype=torch.int8),
        torch.randint(-128, 128, (130, 8 * groups), dtype=torch.int8),
    ]
    weight = pack_linear([(codes[0], torch.rand(130), 4), (codes[1], torch.rand(130), 8)], (groups, groups), (4, 8))
    return [*weight.tiles, weight.scale, weight.row_sum, random(130, seed=7)]


def assert_linear_of(library, kind, operands, linear, groups=1, **attributes):
    """kindLinear is kindQuantize and then MixedLinear, in bytes."""
    codes = Node(library, f"{kind}Quantize", operands, 4, **attributes).run()
    residual = random(*codes[2].shape[:-1], 130, seed=8)
    (expected,) = Node(
        library,
        "MixedLinear",
        [*codes, *linear, residual],
        1,
        low_width=56,
        high_width=8,
        low_groups=groups,
        high_groups=groups,
    ).run()
    (got,) = Node(library, f"{kind}Linear", [*operands, *linear, residual], 1, **attributes).run()
    assert torch.equal(got, expected) and got.shape == (*codes[2].shape[:-1], 130)


@pytest.mark.parametrize("rows", [1, 200])
def test_quantizers_with_their_linear(library, rows):
    norm = dict(norm=1, epsilon=1e-5, low_width=56, high_width=8, high_clip=0.9)
    assert_linear_of(library, "Norm", [random(2, rows, 64), random(64, seed=1), None], linear_operands(), **norm)
    orders = dict(low_width=56, high_width=8, low_order0=2, low_order1=28, high_order0=8)
    dense = hadamard_plan(28).factors[0].float().flatten()
    gated = [random(2, rows, 64), random(2, rows, 64, seed=1), dense]
    assert_linear_of(library, "Hadamard", gated, linear_operands(), activation=1, **orders)


@pytest.mark.parametrize("room", [0, 20])
def test_attention_with_what_stands_around_it(library, room):
    """AttentionLinear is RopeCache, AttentionQuantize and then MixedLinear, in bytes."""
    past, new, d = 12, 3, 64
    cache = formats.pack_cache(random(2, 2, room or past, d), HEAD)
    mask, tables = torch.ones(2, past + new, dtype=torch.bool), [random(1, new, 32, seed=n) for n in (1, 2)]
    rotated = [random(2, new, 8 * d, seed=4), *tables, cache, cache, mask, random(d, d), None, None]
    sinks, linear, residual = random(4, seed=3), linear_operands(4), random(2, new, 130, seed=8)
    heads = HEAD_ATTRIBUTES | {"cache_clip": 0.9}
    made = Node(library, "RopeCache", rotated, 3, **heads).run()
    options = dict(scale=0.125, low_bits=3, **(heads | {"high_clip": 0.8}))
    codes = Node(library, "AttentionQuantize", [*made, mask, sinks], 4, **options).run()
    operands = [*codes, *linear, residual]
    (y,) = Node(library, "MixedLinear", operands, 1, low_width=56, high_width=8, low_groups=4, high_groups=4).run()
    operands = [*rotated, sinks, None, None, None, *linear, residual]
    got = Node(library, "AttentionLinear", operands, 3, **options).run()
    assert all(torch.equal(a, b) for a, b in zip(got, (y, *made[1:]), strict=True))


@pytest.mark.parametrize(("past", "room"), [(0, 0), (9, 0), (9, 20)])
def test_rope_cache_and_attention(library, past, room):
    """Without room, present is a longer copy of past; with room, past and present have as many rows."""
    new, batch, d = 3, 2, 64
    qkv, basis = random(batch, new, 8 * d), torch.linalg.qr(random(d, d))[0].contiguous()
    cos, sin, weight = random(1, new, 32, seed=1), random(1, new, 32, seed=2), random(d, seed=3)
    cache = empty_cache(batch, 2, max(past + new, room), HEAD, HEAD)
    cache.keys[:, :, :past] = formats.pack_cache(random(batch, 2, past, d, seed=4), HEAD)
    cache.values[:, :, :past] = formats.pack_cache(random(batch, 2, past, d, seed=5), HEAD)
    cache.start.fill_(past)
    before = [x[:, :, : room or past].clone() for x in (cache.keys, cache.values)]
    mask = torch.ones(batch, past + new, dtype=torch.bool)
    mask[1, :2] = past == 0
    inputs = [qkv, cos, sin, *before, mask, basis, weight, weight]
    q, keys, values = Node(library, "RopeCache", inputs, 3, epsilon=1e-6, **HEAD_ATTRIBUTES).run()
    pieces = [x.unflatten(-1, (-1, d)) for x in qkv.split([4 * d, 2 * d, 2 * d], -1)]
    expected = rope_cache(library, *pieces, (cos, sin), cache, basis, weight, weight, 1e-6)
    assert torch.equal(q, expected) and torch.equal(keys, cache.keys) and torch.equal(values, cache.values)

    operands, options = [q, keys, values, mask], dict(scale=0.125, window=5, softcap=3.0)
    (y,) = Node(library, "Attention", operands, 1, **options, **HEAD_ATTRIBUTES).run()
    assert torch.equal(y.unflatten(-1, (4, d)), attention(library, q, cache, 0.125, mask, 5, 3.0))
    got = Node(
        library, "AttentionQuantize", operands, 4, **options, **(HEAD_ATTRIBUTES | {"low_bits": 3, "high_clip": 0.9})
    ).run()
    parts = [CodePart(3, 56, 4), CodePart(8, 8, 4, 0.9)]
    assert_codes(got, attention(library, q, cache, 0.125, mask, 5, 3.0, None, parts), (batch, new))


@pytest.mark.parametrize("room", [0, 12])
def test_cache_image(library, room):
    """With and without room in the past, of more columns than heads may have."""
    head, x = CachedHead(300, 40), random(2, 1, 3, 340)
    past, mask = formats.pack_cache(random(2, 1, room or 4, 340, seed=1), head), torch.ones(2, 7, dtype=torch.bool)
    image, present = Node(library, "CacheImage", [x, past, mask], 2, low_width=300, high_width=40).run()
    cache = torch.cat((past[:, :, :4], formats.pack_cache(x, head), past[:, :, 7:]), 2)
    assert torch.equal(present, cache) and torch.equal(image, formats.unpack_cache(cache[:, :, :7], head))
    with pytest.raises(Exception, match="(?s)the_node.*past does not fit: expected as many rows as the mask has"):
        Node(library, "CacheImage", [x, past[:, :, :2], mask], 2, low_width=300, high_width=40).run()


@pytest.mark.parametrize("past", [4, 700])
def test_attention_with_a_prefix(library, past):
    q, cache = random(2, 1, 4, 64), empty_cache(2, 2, past + 1, HEAD, HEAD)
    cache.keys.copy_(formats.pack_cache(random(2, 2, past + 1, 64, seed=1), HEAD))
    cache.values.copy_(formats.pack_cache(random(2, 2, past + 1, 64, seed=2), HEAD))
    cache.start.fill_(past)
    sinks, prefix = random(4, seed=3), (random(2, 3, 64, seed=4), random(2, 3, 64, seed=5))
    mask = torch.ones(2, past + 1, dtype=torch.bool)
    inputs = [q, cache.keys, cache.values, mask, sinks, *(x[None] for x in prefix)]
    (y,) = Node(library, "Attention", inputs, 1, scale=0.125, **HEAD_ATTRIBUTES).run()
    assert torch.equal(
        y.unflatten(-1, (4, 64)), attention(library, q, cache, 0.125, mask, 0, 0.0, sinks, prefix=prefix)
    )


def test_errors_name_the_node(library):
    def fails(message, *arguments, **attributes):
        with pytest.raises(Exception, match=f"(?s){message}") as caught:
            Node(library, *arguments, **attributes).run()
        assert "the_node" in str(caught.value) or "attributes" in message

    fails("x does not fit: expected as many columns as its parts", "NormQuantize", [random(1, 3, 40)], 4, low_width=41)
    fails("weight does not fit", "NormQuantize", [random(1, 3, 40), random(39)], 4, low_width=40)
    fails(
        "attributes of a NormQuantize node do not fit", "NormQuantize", [random(1, 3, 40)], 4, low_width=40, low_bits=9
    )
    fails("attributes of a NormQuantize node do not fit", "NormQuantize", [random(1, 3, 40)], 4)
    fails("a transform does not fit", "HadamardQuantize", [random(1, 40)], 4, high_width=40, high_order0=20)
    linear = linear_operands()
    fails(
        "weight_high does not fit",
        "NormLinear",
        [random(1, 3, 64), None, None, linear[0], linear[0], *linear[2:]],
        1,
        low_width=56,
        high_width=8,
    )
    fails("factors does not fit", "HadamardQuantize", [random(1, 20)], 4, high_width=20, high_order0=20)
    q, cache, mask = (
        random(1, 1, 4, 64),
        torch.zeros(1, 2, 4, HEAD.row_bytes, dtype=torch.uint8),
        torch.ones(1, 5, dtype=torch.bool),
    )
    fails(
        "present does not fit: expected a row for every token",
        "Attention",
        [q, cache, cache, mask],
        1,
        **HEAD_ATTRIBUTES,
    )
    four = torch.ones(1, 4, dtype=torch.bool)
    operands = [q, cache, cache, four, None]
    fails(
        "prefix does not fit: expected keys and values",
        "Attention",
        [*operands, random(1, 2, 1, 64)],
        1,
        **HEAD_ATTRIBUTES,
    )
    wrong = [*operands, random(1, 2, 1, 64), random(1, 2, 2, 64)]
    fails("prefix_value does not fit", "Attention", wrong, 1, **HEAD_ATTRIBUTES)
    fails("q does not fit", "Attention", [q[..., :32].contiguous(), cache, cache, mask], 1, **HEAD_ATTRIBUTES)
    fails(
        "attributes of a Attention node", "Attention", [q, cache, cache, mask], 1, **(HEAD_ATTRIBUTES | {"kv_heads": 3})
    )
    qkv, table = random(1, 1, 8 * 64), random(1, 1, 16)
    fails(
        "past does not fit",
        "RopeCache",
        [qkv, table, table, cache[:, :, :2], cache[:, :, :2], mask],
        3,
        **HEAD_ATTRIBUTES,
    )


def test_rows_of_a_weight(library):
    """Codes times scales, of channels in any tile; a number that no token has is an error."""
    codes = torch.randint(-127, 128, (150, 43), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale, ids = random(150, seed=1).abs(), torch.tensor([[0, 149, 63], [64, 17, 128]])
    tiles = formats.pack_weight(codes, 8)
    (got,) = Node(library, "Rows", [ids, tiles, scale], 1, high_width=43).run()
    assert torch.equal(got, (codes.float() * scale[:, None])[ids])
    for wrong in (-1, 150):
        with pytest.raises(Exception, match="(?s)the_node.*ids does not fit: expected token numbers from 0"):
            Node(library, "Rows", [ids.fill_(wrong), tiles, scale], 1, high_width=43).run()
    with pytest.raises(Exception, match="(?s)the_node.*weight does not fit: expected tiles of as many channels"):
        Node(library, "Rows", [ids, tiles[:2], scale], 1, high_width=43).run()


def test_embedding_and_angles(library):
    """Codes of 8 bits times scales; positions times frequencies, twice."""
    codes = torch.randint(-127, 128, (50, 12), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale, ids = random(50, 1, seed=1), torch.tensor([[0, 49, 7], [7, 3, 20]])
    (got,) = Node(library, "Embed", [ids, codes, scale], 1).run()
    assert torch.equal(got, codes[ids].float() * scale[ids])
    frequencies, positions = random(5, seed=2), torch.tensor([[0, 1, 4095], [2**24 + 1, 7, 3]])
    (got,) = Node(library, "Angles", [positions, frequencies], 1).run()
    assert torch.equal(got, (positions[..., None].float() * frequencies).repeat(1, 1, 2))
    (got,) = Node(library, "Seen", [torch.tensor([[0, 1, -3], [2**40, 0, 1]])], 1).run()
    assert got.tolist() == [[False, True, True], [True, False, True]]
    for wrong in (-1, 50):
        with pytest.raises(Exception, match="(?s)the_node.*ids does not fit: expected token numbers from 0"):
            Node(library, "Embed", [ids.fill_(wrong), codes, scale], 1).run()
    with pytest.raises(Exception, match="(?s)the_node.*scale does not fit"):
        Node(library, "Embed", [ids.fill_(1), codes, scale[:-1]], 1).run()


KEPT = [
    (0, [[0, 1, 2, 3]] * 2),
    (1, [[1], [3]]),
    (3, [[0, 0, 1], [1, 2, 3]]),
    (9, [[0, 0, 0, 1], [0, 1, 2, 3]]),
]


@pytest.mark.parametrize(("keep", "rows"), KEPT)
def test_kept_rows(library, keep, rows):
    """They end with the last token that is not masked; before the first one stands the first one."""
    hidden, mask = random(2, 4, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    (got,) = Node(library, "Keep", [hidden, mask, torch.tensor([keep])], 1).run()
    assert torch.equal(got, torch.stack([hidden[b, rows[b]] for b in range(2)]))


def test_rows_that_cannot_be_kept(library):
    hidden, mask = random(2, 4, 6), torch.ones(2, 6, dtype=torch.int64)
    one = torch.tensor([1])
    for operands in (
        [hidden, mask[:, :3], one],
        [hidden, mask[:1], one],
        [hidden[:, :0], mask, one],
        [hidden, mask, -one],
        [hidden, mask, torch.tensor([1, 1])],
    ):
        with pytest.raises(Exception, match="(?s)the_node.*does not fit"):
            Node(library, "Keep", operands, 1).run()
