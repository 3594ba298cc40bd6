from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.errors import CaptureError
from resq_compiler.frontend.capture import EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST, capture, concrete_example
from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import TINY_FAMILIES, tiny_model, tiny_tokens

EXACT = 1e-5  # the captured graph runs the model's own operators: float32 rounding of attention kernels


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model(family).config)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_inputs_and_outputs_have_stable_names_and_order(family, captured, tiny):
    made = captured(family)
    layers = tiny(family).config.get_text_config().num_hidden_layers
    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_{kind}_{i}" for i in range(layers) for kind in ("key", "value")]
    assert [n.name for n in graph_tools.placeholders(made.graph_module.graph)] == names
    assert len(graph_tools.output_args(made.graph_module.graph)) == 1 + 2 * layers and len(made.cache) == layers


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_graph_for_every_size(family, captured, tiny):
    """Prefill (no past), one new token, batch 1 and lengths unlike the example's, against the eager model."""
    made, model = captured(family), tiny(family)
    for batch, prefill, new in ((1, 1, 1), (1, 9, 1), (4, 3, 7)):
        assert (batch, new, prefill) != (EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST)
        ids = tiny_tokens(batch, prefill + new)
        mask = torch.ones_like(ids)
        positions = torch.arange(prefill + new).expand(batch, -1)
        empty = [torch.zeros(batch, s.num_heads, 0, w) for s in made.cache for w in (s.key_dim, s.value_dim)]
        with torch.no_grad():
            first, *past = made.graph_module(ids[:, :prefill], mask[:, :prefill], positions[:, :prefill], *empty)
            second, *past = made.graph_module(ids[:, prefill:], mask, positions[:, prefill:], *past)
            expected = model(ids, use_cache=False).logits
        assert relative_error(torch.cat((first, second), 1), expected) <= EXACT
        assert all(t.shape[2] == prefill + new for t in past)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_meta_device_gives_the_same_topology(family, build):
    """No weights at all: the named graph has the nodes of the one with weights."""
    gm, ctx = trace(on_meta(family))
    real = build(family, "fold-norms")
    assert all(t.is_meta for n, t in gm.named_parameters())
    shown = [
        [(b.index, b.attention.num_heads, len(b.feed_forwards)) for b in c.facts.get(Topology).blocks]
        for c in (ctx, real.ctx)
    ]
    assert shown[0] == shown[1] and ctx.facts.get(Topology).hidden_size == 64


def test_copies_no_weights(captured, tiny):
    pointers = {p.data_ptr() for p in tiny("llama").parameters()}
    tensors = [t for t in captured("llama").graph_module.buffers() if t.is_floating_point() and t.numel() > 64]
    assert len(tensors) == 15 and {t.data_ptr() for t in tensors} <= pointers


def test_leaves_the_model_as_it_was(tiny):
    model = tiny_model("gemma2").train()
    before = model.config._attn_implementation
    capture(model)
    assert model.training and model.config._attn_implementation == before


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_models_without_a_cache_are_refused(model_type):
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](vocab_size=64, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(CaptureError, match=f"capture of {type(model).__name__}: .*attention in every layer"):
        capture(model)


def test_control_flow_over_values_is_refused(monkeypatch):
    model = tiny_model("llama")
    layer = model.model.layers[0]
    plain = type(layer).forward

    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.sum() > 0:
            hidden_states = hidden_states * 2
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", forward)
    with pytest.raises(
        CaptureError, match="reached forward in test_capture.py, line .* Python control flow over values"
    ):
        capture(model)


def test_example_is_deterministic_and_left_padded(captured):
    first, second = (concrete_example(131, captured("llama").cache) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, mask, positions, *past = first
    assert mask[0, :2].tolist() == [0, 0] and mask[0, 2:].all() and mask[1].all()
    assert positions[0].tolist() == [5, 6, 7, 8, 9] and past[0].shape == (2, 2, 7, 16)
