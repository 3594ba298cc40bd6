from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import PartitionLinears

from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten

LINEAR = aten.linear.default


def parts(gm) -> dict[str, list[meta.LinearPart]]:
    found: dict = {}
    for node in gm.graph.find_nodes(op="call_function", target=LINEAR):
        if fact := meta.get(node, meta.LinearPart):
            found.setdefault(f"{fact.site.role}.{fact.site.block}", []).append(fact)
    return found


def columns(facts) -> list[tuple]:
    return [(f.start, f.stop, f.weight_bits, f.activation_bits, f.heads) for f in facts]


def test_rewrites(build):
    built = build("qwen3", "partition-linears")
    assert PartitionLinears().run(built.gm, built.ctx) == 14
    found = parts(built.gm)
    assert columns(found["q.0"]) == [(0, 56, 4, 4, 1), (56, 64, 8, 8, 1)]  # 1/8 of 64, high last
    assert columns(found["o.1"]) == [(0, 21, 4, 4, 4), (21, 24, 8, 8, 4)]  # inside each of 4 heads of 24
    assert columns(found["down.0"]) == [(0, 160, 4, 4, 1)]  # U_D is full-width


def test_inputs_are_shared_by_the_linears_that_read_them(build):
    gm = build("llama", "quantize-weights").gm
    readers = [len(n.users) for n in gm.graph.find_nodes(op="call_function", target=ops.columns)]
    assert sorted(readers) == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]  # o | gate, up | q, k, v; two widths, two blocks


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"low_fraction": 0.25}, [(0, 16, 2, 2), (16, 56, 4, 4), (56, 64, 8, 8)]),
        ({"high_fraction": 0.0}, [(0, 64, 4, 4)]),
        ({"high_fraction": 0.5}, [(0, 32, 4, 4), (32, 64, 8, 8)]),
        ({"rank_multiple": 16}, [(0, 48, 4, 4), (48, 64, 8, 8)]),  # 8 rounds up to 16
        ({"activation_bits": 16}, [(0, 56, 4, 16), (56, 64, 8, 16)]),
        ({"weight_bits": 16}, [(0, 56, 16, 4), (56, 64, 16, 8)]),
        ({"activation_bits": 8}, [(0, 56, 4, 8), (56, 64, 8, 8)]),
        ({"weight_bits": 8, "activation_bits": 8}, [(0, 64, 8, 8)]),
    ],
    ids=str,
)
def test_options(options, expected, build):
    built = build(
        "llama", "quantize-weights" if options.get("weight_bits") != 16 else "quantize-activations", **options
    )
    assert [c[:4] for c in columns(parts(built.gm)["q.0"])] == expected


def test_leaves_alone(build):
    """lm_head is not partitioned unless asked for; with lm_head_bits it is one 8-bit part."""
    assert "head.None" not in parts(build("llama", "quantize-weights").gm)
    found = parts(build("llama", "quantize-weights", lm_head_bits=8).gm)
    assert columns(found["head.None"]) == [(0, 64, 8, 8, 1)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "opt"])
@pytest.mark.parametrize("options", [{}, {"low_fraction": 0.25}, {"high_fraction": 0.5, "lm_head_bits": 8}], ids=str)
def test_numerics(family, options, build):
    built = build(family, "partition-linears", double=True, **options)
    built.pipeline.run(built.gm, [PartitionLinears()])
    assert built.pipeline.stages[-1].max_error <= 1e-9  # the same products, summed in another order


def test_weights_are_slices(build):
    before = build("llama", "partition-linears")
    site = before.topology.blocks[0].attention.o
    weight = graph_tools.get_tensor(before.gm, site.args[1]).unflatten(1, (4, 16))
    PartitionLinears().run(before.gm, before.ctx)
    low, high = (dict(before.gm.named_buffers())[f"model.layers.0.self_attn.o_proj.part{i}.weight"] for i in (0, 1))
    assert torch.equal(low, weight[:, :, :14].flatten(1)) and torch.equal(high, weight[:, :, 14:].flatten(1))


def test_idempotent(build):
    built = build("llama", "quantize-weights")
    assert PartitionLinears().run(built.gm, built.ctx) == 0
