"""Decoders of transformers beyond the families of tiny.py, on every backend; or one clear error that says why not."""

from __future__ import annotations

import pytest

import resq_compiler
from resq_compiler.api import trace
from resq_compiler.errors import ResqError
from resq_compiler.evaluation.sizes import average_bits
from resq_compiler.frontend.checks import check_model
from resq_compiler.tiny import tiny_tokens
from tests.families import EIGHT, FAMILIES, HEAD, LATENT_FAMILIES, MIXTURES, PAGE, WORK, check_exact, row, small

LINES = dict(zip(FAMILIES, PAGE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines(), strict=True))
FEW = ("bloom", "gptj", "apertus", "gemma4_text")
"""ALiBi over flattened heads; interleaved rotary embedding of some channels; an activation of its own; heads of two widths."""


def test_the_page_has_a_line_for_every_family():
    """Measured by the next two tests; `python -m tests.families` writes it."""
    assert PAGE.read_text(encoding="utf-8").startswith(HEAD)
    assert all(line.startswith(f"| `{name}` | yes | yes | yes |") for name, line in LINES.items())


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_do_what_the_page_says(name):
    check_exact(name)
    assert row(name) == LINES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FEW])
def test_every_family_does_what_the_page_says(name):
    check_exact(name)
    assert row(name) == LINES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_bits_are_shared_out(name):
    """Gradients reach every site of every structure, and the default recipe ends in a model that computes."""
    sizes = {"calibration_samples": 4, "calibration_length": 32, "weight_method": "rtn"}
    compiled = resq_compiler.compile(small(name), tiny_tokens(4, 32), average_bits=4.75, **sizes)
    stage = next(s for s in compiled.stages if s.name == "allocate-bits")
    assert len(stage.lines) == 1 + 2 + stage.rewrites > 10
    assert compiled(tiny_tokens(2, 20, seed=5)).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys((*MIXTURES, *LATENT_FAMILIES)))
def test_larger_mixtures_and_latent_attention(name):
    """24 experts, groups of them, widths that are no powers of two: exact passes keep the logits, and 4 bits compute."""
    check_exact(name, larger=True)
    model = small(name, larger=True)
    assert sum(p.numel() for p in model.parameters()) > 20 * sum(p.numel() for p in small(name).parameters())
    sizes = {"calibration_samples": 4, "calibration_length": 128, "unreached_experts": "layer", "expert_tokens": 64}
    compiled = resq_compiler.compile(model, tiny_tokens(4, 128), **sizes)
    assert compiled(tiny_tokens(2, 20, seed=5)).logits.isfinite().all()
    bits = average_bits(compiled)
    assert 4.3 < bits.weights < 4.7
    assert 4.3 < bits.kv <= 5.5  # high columns come in eights: of heads of 16 and 24 they are more than an eighth


REFUSED = {
    "afmoe": r"pass \d find-topology: node attention: expected merge_heads and then one linear \(output projection\)",
    "bamba": r"cannot compute logits from token ids alone: .*; expected a decoder-only",
    "bart": r"pass \d find-topology: node \w+: the residual stream starts here; expected a token embedding",
    "bert": r"not a causal decoder",
    "ctrl": r"node \w+: in the residual stream; expected an add",
    "laguna": r"pass \d split-fused: node view_\d: expected the heads of attention merged",
    "mamba": r"it wrote no keys and values into its cache; expected a decoder with attention in every layer",
    "openai-gpt": r"it wrote no keys and values into its cache",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_clear_error(name):
    """State spaces, post-norm encoder blocks: a ResqError with the node or module and what was expected."""
    model = small(name)
    with pytest.raises(ResqError, match=REFUSED[name]):
        check_model(model)
        trace(model)


@pytest.mark.parametrize("name", ["afmoe", "ctrl"])
def test_compile_refuses_with_the_same_error(name):
    """What looks at the topology while a compile runs does not hide why there is none."""
    with pytest.raises(ResqError, match=REFUSED[name]):
        resq_compiler.compile(small(name), tiny_tokens(4, 32), **EIGHT)
