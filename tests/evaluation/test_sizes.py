"""Sizes and average bits, against counts by hand and files on disk; measurements beside a reference."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from resq_compiler.evaluation import comparison, sizes
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.tiny import tiny_tokens

HIDDEN, WIDE, KV, HEADS, KV_HEADS, DIM = 64, 160, 32, 4, 2, 16  # of the tiny llama


def test_average_bits_by_hand(compiled):
    bits = sizes.average_bits(compiled("llama", weight_method="rtn"))
    split = (HIDDEN + KV + KV + HIDDEN + 2 * WIDE) * HIDDEN  # q, k, v, o, gate, up: 7/8 in 4 bits, 1/8 in 8
    whole = HIDDEN * WIDE  # down: 4 bits
    assert bits.weights == pytest.approx((4.5 * split + 4 * whole) / (split + whole), rel=1e-12)
    rows = 2 * (HIDDEN + KV + KV + HIDDEN + 2 * WIDE) + HIDDEN  # two parts each, one for down
    assert bits.weight_scales == pytest.approx(32 * rows / (split + whole), rel=1e-12)
    assert bits.activations == pytest.approx((4.5 * 3 * HIDDEN + 4 * WIDE) / (3 * HIDDEN + WIDE), rel=1e-12)
    assert bits.activation_scales == pytest.approx(40 * (2 + 2 + 2 * HEADS + 1) / (3 * HIDDEN + WIDE), rel=1e-12)
    assert (bits.kv, bits.kv_scales) == (4.5, 2 * 40 / DIM)


def test_scales_of_groups_count(compiled):
    """Parts of 56 and 8 columns are two groups of 32 and one; 160 columns are five."""
    bits = sizes.average_bits(compiled("llama", weight_method="rtn", weight_group_size=32))
    split, whole = (HIDDEN + KV + KV + HIDDEN + 2 * WIDE) * HIDDEN, HIDDEN * WIDE
    scales = 3 * (HIDDEN + KV + KV + HIDDEN + 2 * WIDE) + 5 * HIDDEN
    assert bits.weight_scales == pytest.approx(32 * scales / (split + whole), rel=1e-12)


def test_average_bits_of_what_stays_float(compiled):
    bits = sizes.average_bits(compiled("llama", weight_method="rtn", activation_bits=16, kv_bits=16, high_fraction=0.0))
    assert (bits.weights, bits.activations, bits.activation_scales, bits.kv, bits.kv_scales) == (4, 16, 0, 16, 0)


def test_sizes_are_those_of_the_saved_file(compiled, tmp_path):
    """Codes, scales, embeddings and head as counted from the graph are the bytes that safetensors finds on disk."""
    model = compiled("llama", weight_method="rtn")
    model.save_pretrained(tmp_path)
    stored = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(t.numel() * t.element_size() for t in map(file.get_tensor, file.keys()))
    found = sizes.memory_bytes(model)
    assert found["total"] == sum(size for kind, size in found.items() if kind != "total")
    assert found["total"] == stored
    assert found["embeddings"] == found["head"] == 131 * HIDDEN * 4
    assert found["total"] < sizes.resident_bytes(model.graph_module)  # the reference backend keeps a byte for each code


def test_head_in_eight_bits(compiled):
    found = sizes.memory_bytes(compiled("llama", weight_method="rtn", lm_head_bits=8))
    assert found["head"] == 131 * HIDDEN + 131 * 4


def test_cache_bytes(compiled):
    low, high = 14, 2  # of a head of 16
    entry = low / 2 + high + 2 * 5  # codes, then a scale and a zero point for each part
    assert sizes.cache_bytes_per_token(compiled("llama", weight_method="rtn")) == 2 * 2 * KV_HEADS * entry
    floats = compiled("llama", weight_method="rtn", activation_bits=16, kv_bits=16, high_fraction=0.0)
    assert sizes.cache_bytes_per_token(floats) == 2 * 2 * KV * 4


def test_measure_observes_the_reference(compiled, tiny):
    windows = tiny_tokens(4, 24, seed=3)
    model = compiled("llama", weight_method="rtn")
    found = comparison.measure(model, windows, tiny("llama"), batch_size=2)
    alone = evaluate(tiny("llama"), windows, batch_size=2)
    assert found["reference"]["nll"] == pytest.approx(alone.nll, rel=1e-12)  # the same logits
    assert found["reference"]["tokens"] == alone.tokens
    assert found["model"] | {"seconds": 0, "tokens_per_second": 0} == evaluate(
        model, windows, tiny("llama"), batch_size=2
    ).to_dict() | {"seconds": 0, "tokens_per_second": 0}
    text = comparison.measure_table(found)
    assert "KL divergence" in text and "average bits of the KV cache" in text
    assert "bits" not in comparison.measure_table(comparison.measure(tiny("llama"), windows))


def test_a_loaded_model_reports_as_a_fresh_one(compiled, tmp_path):
    from resq_compiler.api import load

    model = compiled("llama", weight_method="rtn")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert sizes.describe(again) == sizes.describe(model)
