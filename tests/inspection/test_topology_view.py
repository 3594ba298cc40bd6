"""The topology tree, on weights without data."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.inspection.topology_view import topology_dict, topology_text
from resq_compiler.tiny import tiny_model


def view(family):
    with torch.device("meta"):
        config = tiny_model(family).config
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _, ctx = trace(model)
    return topology_dict(ctx.facts.get(Topology))


def test_pre_norm_model_fuses_the_residual_basis():
    found = view("llama")
    assert found["residual"]["fusable"] and len(found["residual"]["writers"]) == 5
    assert {row["basis"] for row in found["not_fused"]} == {"U_C", "U_D"}
    text = topology_text("Tiny", found)
    assert text.splitlines()[0] == "Tiny"
    assert "blocks 0 to 1, all as the first" in text and "q    model.layers.0.self_attn.q_proj  64 → 64" in text
    # 4 heads and 2 for keys, of 16 channels, in both blocks; a key basis of 16 x 16 float32 values each
    assert "U_C (blocks 0 to 1; 3,072 multiplications a token, 2.0 kB): position embedding" in text


def test_post_norm_model_says_why_not():
    found = view("olmo2")
    assert not found["residual"]["fusable"]
    reason = next(row["why"] for row in found["not_fused"] if row["basis"] == "U_A")
    assert "4 norms with a gain" in reason and "post_attention_layernorm" in reason
    (cost,) = [(r["multiplications"], r["bytes"]) for r in found["not_fused"] if r["basis"] == "U_A"]
    assert cost == (4 * 64 * 64, 4 * 4 * 64 * 64)


def test_norms_that_keep_their_gains_show_with_what_they_cost(build):
    topology = build("llama", "fold-norms").topology
    topology.readers[1].online = True
    (row,) = [row for row in topology_dict(topology)["not_fused"] if row["basis"] == "U_A"]
    assert "1 norms (model.layers.0.post_attention_layernorm, ...) keep their gains" in row["why"]
    assert (row["multiplications"], row["bytes"]) == (64 * 64, 4 * 64 * 64)


@pytest.mark.parametrize("family", ["gemma3", "opt"])
def test_windows_and_biases_show(family):
    text = topology_text(family, view(family))
    assert ("window of 6" in text) == (family == "gemma3")
    assert ("+ bias" in text) == (family == "opt")
