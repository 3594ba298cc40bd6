from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from resq_compiler.analysis.dataflow import analyze
from resq_compiler.api import trace
from resq_compiler.errors import ResqError, TopologyError
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.graph_tools import aten
from resq_compiler.tiny import SLIDING_WINDOW, TINY_FAMILIES

COMMON = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
UNGATED = {"gpt_neox", "gpt_neox-sequential", "opt"}
POST_NORM = {"gemma2", "gemma3", "olmo2"}


def topology_of(build, family):
    return build(family, "fold-norms").topology


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_blocks_heads_and_roles(family, build, tiny):
    topology, config = topology_of(build, family), tiny(family).config
    assert len(topology.blocks) == config.num_hidden_layers and topology.hidden_size == 64
    for block in topology.blocks:
        a = block.attention
        assert a.num_heads == 4 and a.num_kv_heads == getattr(config, "num_key_value_heads", 4)
        assert a.head_dim == a.value_dim == (getattr(config, "head_dim", None) or 16)
        assert a.value_is_linear
        (mlp,) = block.feed_forwards
        assert (len(mlp.gates), len(mlp.ups)) == ((1, 0) if family in UNGATED else (1, 1)) and mlp.channelwise
    assert topology.residual.fusable is (family not in POST_NORM)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_roles_agree_with_the_names_of_the_modules(family, build):
    """The names are not used to find roles, so they can judge them."""
    fused = ("qkv_proj", "query_key_value")
    words = {
        "q": ("q_proj", *fused), "k": ("k_proj", *fused), "v": ("v_proj", *fused), "o": ("o_proj", "out_proj", "dense"),
        "gate": ("gate", "fc1", "dense_h_to_4h"), "up": ("up_proj", "gate_up"), "down": ("down_proj", "fc2", "dense_4h_to_h"),
        "head": ("lm_head", "embed_out"),
    }  # fmt: skip
    sites = [meta.get(n, meta.LinearSite) for n in topology_of(build, family).head.graph.nodes]
    for site in filter(None, sites):
        assert any(word in site.name for word in words[site.role]), site
        assert site.block is None or f".{site.block}." in site.name


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "llama"])
def test_windows(family, build, tiny):
    windows = [b.attention.window for b in topology_of(build, family).blocks]
    kinds = getattr(tiny(family).config, "layer_types", None)
    if family == "mistral":
        kinds = ["sliding_attention"] * 2
    expected = [SLIDING_WINDOW if kinds and k == "sliding_attention" else None for k in kinds or [None] * 2]
    assert windows == expected


def test_residual_stream_of_parallel_and_sequential_blocks(build):
    for family, groups in (("gpt_neox", 5), ("gpt_neox-sequential", 5), ("llama", 5)):
        residual = topology_of(build, family).residual
        assert len(residual.readers) == groups and len(residual.writers) == 5  # embedding, 2 o, 2 down
        assert all(g.norm is not None for g in residual.readers)


def test_learned_positions_are_writers(build):
    writers = topology_of(build, "opt").residual.writers
    assert sum(n.target is aten.embedding.default for n in writers) == 2


def test_post_norms_write_into_the_stream(build):
    residual = topology_of(build, "olmo2").residual
    assert len(residual.gained_writers) == 4 and len(residual.writers) == 1


UNKNOWN = {
    "diffllama": COMMON,  # the difference of two attentions
    "bitnet": COMMON,  # a norm between attention and output projection
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_unknown_structures_are_errors_that_name_a_node(model_type):
    """What is not understood is refused where it is met, and nothing is guessed."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**UNKNOWN[model_type])).eval()
    with pytest.raises(ResqError, match=r"pass \d [a-z-]+: node \w+.*(expected|should)"):
        trace(model)


def break_and_analyze(build, change):
    built = build("llama", "find-topology")
    change(built.gm)
    analyze(built.gm)


def test_stream_read_by_something_else(build):
    def change(gm):
        stream = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
        with gm.graph.inserting_after(stream):
            extra = gm.graph.call_function(aten.relu.default, (stream,))
        gm.graph.output_node().args = ((*graph_tools.output_args(gm.graph), extra),)

    with pytest.raises(TopologyError, match=r"node relu\w*: reads the residual stream; expected a norm or a linear"):
        break_and_analyze(build, change)


def test_stream_written_by_something_else(build):
    def change(gm):
        stream = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
        with gm.graph.inserting_before(stream):
            odd = gm.graph.call_function(aten.tanh.default, (stream.args[1],))
        stream.update_arg(1, odd)

    with pytest.raises(TopologyError, match=r"node tanh\w*: .*residual stream.*expected an add"):
        break_and_analyze(build, change)


def test_logits_that_come_from_no_linear(build):
    def change(gm):
        logits, *rest = graph_tools.output_args(gm.graph)
        with gm.graph.inserting_after(logits):
            odd = gm.graph.call_function(aten.relu.default, (logits,))
        gm.graph.output_node().args = ((odd, *rest),)

    with pytest.raises(TopologyError, match=r"node relu\w*: expected the logits to come from a linear"):
        break_and_analyze(build, change)


def test_a_linear_that_belongs_nowhere(build):
    """Two linears in a row instead of one down projection."""

    def change(gm):
        linear = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[3]  # o_proj
        with gm.graph.inserting_after(linear):
            second = gm.graph.call_function(aten.linear.default, (linear, linear.args[1]))
        second.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)

    with pytest.raises(TopologyError, match=r"node \w+"):
        break_and_analyze(build, change)
