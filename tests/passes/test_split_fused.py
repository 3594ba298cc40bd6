from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import SplitFused

from resq_compiler.api import trace
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Rope
from resq_compiler.pipeline.run import prefill_and_decode
from resq_compiler.tiny import TINY_FAMILIES
from tests.families import small

LINEAR = aten.linear.default


def linears(gm):
    return gm.graph.find_nodes(op="call_function", target=LINEAR)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rewrites(family, build):
    gm = build(family, "untie-embeddings").gm
    assert not {n.target for n in gm.graph.nodes} & {
        aten.chunk.default,
        aten.split.Tensor,
        aten.transpose.int,
        aten.view.default,
    }
    blocks = len(gm.graph.find_nodes(op="call_function", target=ops.attention))
    assert len(gm.graph.find_nodes(op="call_function", target=ops.split_heads)) == 3 * blocks
    assert len(gm.graph.find_nodes(op="call_function", target=ops.merge_heads)) == blocks


def test_fused_rows_are_those_the_model_reads(build, tiny):
    """phi3: [q | k | v] and [gate | up]; gpt_neox: rows of q, k and v alternate by head. Layouts as transformers' modules document them."""
    gm = build("phi3", "untie-embeddings").gm
    layer = tiny("phi3").model.layers[0]
    qkv, gate_up = layer.self_attn.qkv_proj.weight, layer.mlp.gate_up_proj.weight
    expected = [qkv[:64], qkv[64:96], qkv[96:], layer.self_attn.o_proj.weight, gate_up[:160], gate_up[160:]]
    found = [graph_tools.get_tensor(gm, n.args[1]) for n in linears(gm)[:6]]
    assert all(any(torch.equal(e, f) for f in found) for e in expected) and len(linears(gm)) == 2 * 7 + 1

    gm = build("gpt_neox", "untie-embeddings").gm
    fused = tiny("gpt_neox").gpt_neox.layers[0].attention.query_key_value
    rows = torch.arange(3 * 64).reshape(4, 3, 16)  # head, (q k v), head_dim
    found = [n for n in linears(gm)[:3]]
    for i in range(3):
        hit = [
            n for n in found if torch.equal(graph_tools.get_tensor(gm, n.args[1]), fused.weight[rows[:, i].flatten()])
        ]
        assert len(hit) == 1
        assert torch.equal(graph_tools.get_tensor(gm, hit[0].args[2]), fused.bias[rows[:, i].flatten()])


def test_leaves_alone(build):
    """Linears that nothing views: mlp and lm_head keep their weight objects."""
    before = build("llama", "split-fused")
    kept = {n.args[1].target for n in linears(before.gm)}
    assert SplitFused().run(before.gm, before.ctx) > 0
    assert {n.args[1].target for n in linears(before.gm)} == kept


def test_refuses_views_that_mix_tokens(build):
    built = build("llama", "split-fused")
    root = linears(built.gm)[0]
    view = next(iter(root.users))
    with built.gm.graph.inserting_after(root):
        mixed = built.gm.graph.call_function(aten.transpose.int, (root, 0, 1))
    mixed.meta["val"] = root.meta["val"].transpose(0, 1)
    view.update_arg(0, mixed)
    with pytest.raises(TopologyError, match=rf"node \w+: .*features of {root.name}.*mix tokens or rows"):
        SplitFused().run(built.gm, built.ctx)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "qwen3", "gemma3"])
def test_numerics(family, build):
    built = build(family, "split-fused")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [SplitFused()])
    torch.testing.assert_close(
        prefill_and_decode(built.gm, built.ctx.example_inputs), before, rtol=1e-5, atol=1e-5
    )  # rounding


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_idempotent(family, build):
    built = build(family, "untie-embeddings")
    assert SplitFused().run(built.gm, built.ctx) == 0


@pytest.mark.parametrize("family", ["gemma4_text", "persimmon"])
def test_heads_come_before_tokens_where_the_model_turns_them_later(family):
    """Norms work on [B, S, H, D] in both, rotary embeddings in Gemma 4 alone."""
    graph, _ = trace(small(family))
    turns = graph.graph.find_nodes(op="call_function", target=ops.rope)
    assert len(turns) == 4
    tokens = {values.shape(node)[2] for node in graph.graph.find_nodes(op="call_function", target=ops.attention)}
    for node in turns:
        rope = Rope.require(node)
        assert {values.shape(n)[2] for n in (rope.x, rope.cos, rope.sin)} == tokens
        assert values.shape(rope.cos)[1] == 1 and values.shape(rope.x)[1] in (4, 2, 1)
