"""The text form of passes: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resq_compiler.passes import PASSES, AllocateBits, PlanColumns, QuantizeActivations, QuantizeWeights

from resq_compiler.analysis.site_shares import SiteShares
from resq_compiler.errors import ConfigError
from resq_compiler.recipes.named import RECIPES, choose, passes_for, resolve
from resq_compiler.recipes.settings import RUN_OPTIONS, CompileConfig, words
from resq_compiler.recipes.text import parse, to_text


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_read_back(recipe):
    passes = passes_for(resolve(recipe))
    assert parse(to_text(passes)) == passes


CHOICES = {name: words(name) for name in CompileConfig.__dataclass_fields__ if words(name)}


@given(
    values=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in CHOICES.items()}),
    share=st.floats(0, 0.5, allow_subnormal=False),
    damping=st.floats(0, 1, allow_subnormal=False),
    sites=st.sampled_from(["", "mlp=1/4,o=0", "down.3=1/2@6:1/8@2"]),
)
@settings(max_examples=60, deadline=None)
def test_settings_are_read_back(values, share, damping, sites):
    """Whatever is set, the passes it stands for have a text that gives equal passes."""
    share = 0.0 if values["high_bits"] == 16 else share
    learns = values["basis"] in ("pca", "weights", "hadamard") and values["activation_scales"] == "dynamic"
    values |= {"gptq_on_quantized_activations": True} if learns else {"learn_rotations": "none"}
    values |= {} if values["activation_scales"] == "dynamic" else {"activation_group_size": None}
    values |= {"allocation": "equal", "high_fraction": share, "gptq_damping": damping, "site_fractions": sites}
    passes = passes_for(CompileConfig(**values))
    assert parse(to_text(passes)) == passes


def test_the_form():
    passes = (
        PlanColumns(weight_bits=3, sites=SiteShares.parse("mlp=1/4,o=0"), lm_head_bits=8),
        AllocateBits(average_bits=4.5),
        QuantizeWeights("rtn", act_order=True),
        QuantizeActivations(),
    )
    text = (
        'plan-columns{weight-bits=3,sites="mlp=1/4,o=0",lm-head-bits=8},allocate-bits{average-bits=4.5},'
        "quantize-weights{method=rtn,act-order=true},quantize-activations"
    )
    assert to_text(passes) == text and parse(text) == passes
    assert parse(' plan-columns { high-fraction = 1/16 , lm-head-bits=none } ,quantize-activations{clip="output"}') == (
        PlanColumns(high_fraction=1 / 16), QuantizeActivations("output"),
    )  # fmt: skip
    assert parse("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-norm", "pass 0 fold-norm: there is no such pass; did you mean fold-norms?"),
        ("fold-norms,zzz", "pass 1 zzz: there is no such pass; passes: canonicalize, "),
        ("quantize-weights{clips=max}", "pass 0 quantize-weights: no option 'clips'; did you mean clip?"),
        (
            "quantize-weights{clip=min}",
            "pass 0 quantize-weights, option clip: expected mse, hessian, output, max; got 'min'",
        ),
        ("quantize-weights{damping=x}", "option damping: expected float; got 'x'"),
        (
            "quantize-weights{damping=2}",
            "pass quantize-weights, option damping: expected a number from 0 to 1; got 2.0",
        ),
        ("quantize-weights{clip=max,clip=mse}", "option clip is said twice"),
        ("quantize-weights{clip}", "pass 0 quantize-weights: expected option=value,...; got 'clip'"),
        (
            "fold-norms;find-topology",
            "passes: expected name{option=value,...},name,...; got 'fold-norms;find-topology'",
        ),
        ("plan-columns{sites=head}", "option site_fractions: expected SITE=HIGH"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_every_pass_is_known_by_its_name():
    assert all(kind.name == name and parse(name) == (kind(),) for name, kind in PASSES.items())


def test_options_beside_passes():
    passes = passes_for(resolve("resq", weight_bits=3))
    chosen = choose(passes, seed=3, calibration_samples=2)
    assert chosen.passes == passes and choose(chosen) == chosen and choose(chosen, seed=4).settings.seed == 4
    assert (chosen.settings.weight_bits, chosen.settings.seed, chosen.settings.calibration_samples) == (3, 3, 2)
    assert choose("resq", weight_bits=3).passes == passes
    fields = {n: v for n, v in CompileConfig().to_dict().items() if n not in (*RUN_OPTIONS, "recipe")}
    for name, value in fields.items():
        with pytest.raises(ConfigError, match=f"option {name}: a tuple of passes has it as a field; set it there"):
            choose(passes, **{name: value})
