from __future__ import annotations

import json

import pytest

from resq_compiler.errors import ConfigError
from resq_compiler.recipes.settings import CHOICES, REMOVED, CompileConfig, without_removed


def test_round_trip_through_json():
    config = CompileConfig(weight_bits=3, low_fraction=0.25, basis="none", lm_head_bits=8, seed=7)
    assert CompileConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", CHOICES)
def test_values_out_of_the_list_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=f"option {name}: expected one of .*; got 'odd'"):
        CompileConfig(**{name: "odd"})


@pytest.mark.parametrize(
    "name, value",
    [
        ("high_fraction", 0.51), ("high_fraction", -0.1), ("high_fraction", "1/8"), ("high_fraction", True), ("low_fraction", 0.6),
        ("high_fraction", float("nan")), ("activation_clip", 0.0), ("kv_clip", 1.1), ("gptq_damping", -1), ("rank_multiple", 0),
        ("rank_multiple", 2.0), ("calibration_samples", 0), ("calibration_length", -1), ("calibration_samples", True),
        ("seed", "x"), ("seed", 1.5), ("seed", None), ("gptq_act_order", "no"), ("gptq_on_quantized_activations", 1),
        ("weight_bits", 4.0), ("kv_bits", True), ("site_fractions", "mlp"), ("site_fractions", 3),
        ("site_fractions", "head=1/8"), ("site_fractions", "mlp=0.6"), ("site_fractions", "mlp.3=0"), ("site_fractions", "down.x=0"),
        ("site_fractions", "mlp=1/4@9"), ("site_fractions", "mlp=1/4:2"), ("site_fractions", "mlp=@6"), ("allocation", "all"),
        ("activation_clip", "automatic"), ("kv_clip", "auto"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_option_and_the_value(name, value):
    with pytest.raises(ConfigError, match=f"option {name}: expected .*got "):
        CompileConfig(**{name: value})


EDGES = [
    {"high_fraction": 0}, {"high_fraction": 0.5}, {"low_fraction": 0.5}, {"rank_multiple": 64},
    {"activation_clip": "input"}, {"activation_clip": "output"}
]  # fmt: skip


@pytest.mark.parametrize("values", EDGES)
def test_edges_are_allowed(values):
    assert CompileConfig(**values)


@pytest.mark.parametrize("name", REMOVED)
def test_removed_options_say_so(name):
    with pytest.raises(ConfigError, match=f"option {name}: removed in 0.2"):
        CompileConfig.from_dict({name: REMOVED[name]})
    with pytest.raises(ConfigError, match=f"option {name}: removed in 0.2"):
        without_removed({name: "other"})


def test_removed_options_at_their_defaults_are_left_out_of_what_an_older_version_wrote():
    assert without_removed({**REMOVED, "weight_bits": 8}) == {"weight_bits": 8}


def test_unknown_options_name_the_nearest():
    with pytest.raises(ConfigError, match="unknown option 'weight_bit'; did you mean weight_bits?"):
        CompileConfig.from_dict({"weight_bit": 4})
    with pytest.raises(ConfigError, match="unknown option 'zzz'; options: recipe, weight_bits"):
        CompileConfig.from_dict({"zzz": 4})


def test_scheme():
    assert CompileConfig().scheme == "W4A4KV4"
    assert CompileConfig(activation_bits=16, kv_bits=8).scheme == "W4A16KV8"
