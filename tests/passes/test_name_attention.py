from __future__ import annotations

import contextlib

import pytest
import torch
from resq_compiler.passes import NameAttention

from resq_compiler.api import trace
from resq_compiler.errors import TopologyError
from resq_compiler.frontend import capture
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import Pipeline, prefill_and_decode
from resq_compiler.tiny import SLIDING_WINDOW, TINY_FAMILIES
from tests import families

LAYERS = {"gemma3": 3}
WINDOWS = {
    "llama": [None], "mistral": [SLIDING_WINDOW], "gemma2": [SLIDING_WINDOW, None],
    "gemma3": [SLIDING_WINDOW, None, SLIDING_WINDOW],
}  # fmt: skip


def cores(gm):
    return gm.graph.find_nodes(op="call_function", target=ops.attention)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rewrites(family, build):
    built = build(family, "split-fused")
    layers = LAYERS.get(family, 2)
    assert len(cores(built.gm)) == layers
    assert len(built.gm.graph.find_nodes(op="call_function", target=ops.append_cache)) == 2 * layers
    for core in cores(built.gm):
        assert core.args[1].target is ops.append_cache and core.args[2].target is ops.append_cache  # heads not repeated
        assert core.args[3].target is ops.causal_mask
    left = {n.target for n in built.gm.graph.nodes}
    assert not left & {aten.softmax.int, aten.scaled_dot_product_attention.default, aten.arange.default}


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_scale_and_softcap_come_from_the_configuration(family, build, tiny):
    config = tiny(family).config
    found = cores(build(family, "split-fused").gm)
    windows = [c.args[3].args[2] for c in found]
    assert windows == (WINDOWS[family] * 2 if len(WINDOWS[family]) == 1 else WINDOWS[family])
    width = getattr(config, "query_pre_attn_scalar", None) or config.hidden_size // config.num_attention_heads
    assert all(c.args[4] == pytest.approx(width**-0.5) for c in found)
    assert {c.args[5] for c in found} == {getattr(config, "attn_logit_softcapping", None)}


def test_a_window_in_a_table_of_the_model():
    """GPT-Neo keeps the masks of its layers as buffers; every other layer is local."""
    gm, _ = trace(families.small("gpt_neo"))
    assert [c.args[3].args[2] for c in cores(gm)] == [None, 6]


def test_leaves_alone_a_mask_that_is_not_causal(build):
    """Attention that also sees the next token is kept as its own operators, with a note; nothing is lost."""
    built = build("llama", "name-attention")
    less = [n for n in built.gm.graph.nodes if n.target in (aten.le.Tensor, aten.ge.Tensor, aten.lt.Tensor)]
    assert less
    for node in less:
        with built.gm.graph.inserting_before(node):
            later = built.gm.graph.call_function(aten.add.Tensor, (node.args[1], 1))
        node.update_arg(1, later)
    built.gm.recompile()
    built.pipeline.start(built.gm)
    built.pipeline.run(built.gm, [NameAttention()])
    assert all(c.args[3].target is not ops.causal_mask for c in cores(built.gm))
    assert any("neither causal nor a sliding window" in note for note in built.ctx.notes)


def test_repeats_of_cached_heads_by_the_model_itself(tiny, monkeypatch):
    """A model whose own code repeats keys and values is named as one whose SDPA reads them as they are."""
    monkeypatch.setattr(capture, "grouped_heads_kept", contextlib.nullcontext)
    captured = capture.capture(tiny("llama"))
    gm, ctx = captured.graph_module, PassContext(captured.example_inputs)
    sdpa = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert [values.shape(core.args[i])[1] for core in sdpa for i in (0, 1, 2)] == 6 * [4]
    pipeline = Pipeline(ctx)
    pipeline.start(gm)
    pipeline.run(gm, [NameAttention()])
    assert all(core.args[i].target is ops.append_cache for core in cores(gm) for i in (1, 2))


def test_grouped_heads_are_captured_as_they_are(captured):
    made = captured("llama").graph_module.graph
    sdpa = made.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert [values.shape(core.args[i])[1] for core in sdpa for i in (0, 1, 2)] == 2 * [4, 2, 2]


def test_leaves_alone_attention_without_a_cache(build):
    built = build("llama", "name-attention")
    core = built.gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[0]
    core.update_arg(1, core.args[0])  # queries as keys
    with pytest.raises(TopologyError, match=rf"node {core.args[0].name}: .*append_cache"):
        NameAttention().run(built.gm, built.ctx)


def test_refuses_heads_that_are_not_repeats(build):
    """Keys rolled by one head: equal shapes, another function."""
    built = build("llama", "name-attention")
    core = built.gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[0]
    with built.gm.graph.inserting_before(core):
        turned = built.gm.graph.call_function(aten.slice.Tensor, (core.args[1], 3, 0, -1))
    turned.meta["val"] = core.args[1].meta["val"]
    core.update_arg(1, turned)
    with pytest.raises(TopologyError, match="cached heads repeated"):
        NameAttention().run(built.gm, built.ctx)


def test_refuses_is_causal(build):
    built = build("llama", "name-attention")
    core = built.gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)[0]
    core.args = (*core.args[:3], None, 0.0, True)
    with pytest.raises(TopologyError, match=f"node {core.name}: .*is_causal"):
        NameAttention().run(built.gm, built.ctx)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt"])
def test_numerics(family, build):
    built = build(family, "name-attention")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [NameAttention()])
    torch.testing.assert_close(
        prefill_and_decode(built.gm, built.ctx.example_inputs), before, rtol=1e-5, atol=1e-5
    )  # rounding


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_idempotent(family, build):
    built = build(family, "split-fused")
    nodes = len(built.gm.graph.nodes)
    assert NameAttention().run(built.gm, built.ctx) == 0
    assert len(built.gm.graph.nodes) == nodes and graph_tools.output_args(built.gm.graph)
