"""What a compile says at its end about itself."""

from __future__ import annotations

import math

import pytest
import torch

import resq_compiler
from resq_compiler.inspection import guard
from resq_compiler.ir import expert_views, meta, ops
from resq_compiler.ir.views import CodedLinear
from resq_compiler.tiny import tiny_model, tiny_tokens

SHORT = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}
BAD = {"weight_bits": 2, "activation_bits": 2, "kv_bits": 2, "high_fraction": 0.0}


def graph_of(family: str, **options):
    return resq_compiler.compile(tiny_model(family), tiny_tokens(4, 32), **SHORT, **options)


def test_predictions_are_those_of_the_model(build, tiny):
    ids = tiny_tokens(2, 12)
    with torch.no_grad():
        expected = tiny("llama")(ids).logits.log_softmax(-1)
    torch.testing.assert_close(
        guard.predictions(build("llama", "plan-columns").gm, ids), expected, rtol=1e-4, atol=1e-4
    )


def test_a_model_that_is_of_no_use_ends_with_a_warning(caplog):
    compiled = graph_of("llama", recipe="gptq", **BAD)
    warnings = [note for note in compiled.notes if note.startswith("WARNING: predictions have little to do with")]
    assert len(warnings) == 1 and warnings[0] in caplog.messages
    assert not [note for note in graph_of("llama", recipe="resq").notes if note.startswith("WARNING")]


def test_divergence_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    reference, found = (torch.randn(2, 5, 40, generator=g).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(found, reference, reduction="none", log_target=True).sum(-1).mean()
    assert guard.divergence(reference, found) == pytest.approx(float(expected), rel=1e-5)  # float32 sums of 40 terms


def test_gaussian_values_keep_what_rounding_theory_says():
    """Step = range / 255; noise step² / 12, and the range of 64 Gaussian values is 4.75 in the mean (tables of order statistics)."""
    theory = -20 * math.log10(4.75 / 255 / math.sqrt(12))
    assert guard.gaussian(((8, 0, 64),)) == pytest.approx(theory, abs=0.5)


def test_reasons():
    channel, token, dead, other = guard.HELP
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert guard.reason(x.index_fill(1, torch.tensor([3]), 100.0)) == channel
    massive = x.clone()
    massive[0] *= 1000
    assert guard.reason(massive) == token
    assert guard.reason(x * torch.cat((torch.full((48,), 1e-3), torch.ones(16)))) == dead
    assert guard.reason(x) == other


def test_an_enormous_channel_is_named_as_the_linears_see_it(compile_tiny):
    """Rounded, all looks well: the channel carries the energy. The linears, whose weights put it down, see the others."""
    model, _ = compile_tiny("llama", recipe="gptq", weight_bits=8, activation_bits=8, kv_bits=8)
    gm, ids = model.graph_module, tiny_tokens(2, 16)
    assert guard.weak_quantizers(gm, ids) == []
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).index_fill(1, torch.tensor([3]), 1000.0)
    error = ops.quantize_dequantize(x, ((8, 0, 64),)) - x
    weight = torch.ones(64).index_fill(0, torch.tensor([3]), 1e-6)
    assert guard.signal_to_noise(x, error, torch.ones(64)) > 40 > 10 > guard.signal_to_noise(x, error, weight)
    weak = [guard.Weak("a", 3.0, 40.0, next(iter(guard.HELP))), guard.Weak("b", 9.0, 40.0, next(iter(guard.HELP)))]
    (note,) = guard.describe(weak)
    assert "2 quantizers" in note and "weakest a, 3 dB where Gaussian values keep 40" in note and "resq+" in note


def test_every_quantizer_that_linears_read_knows_their_weights(compile_tiny):
    gm = compile_tiny("llama")[0].graph_module
    activations = {n for n in gm.graph.nodes if (s := meta.get(n, meta.QuantizerSite)) and s.kind == "activation"}
    assert set(guard.read_energies(gm)) == activations


def test_energies_are_those_of_whole_weights(compile_tiny, monkeypatch):
    gm = compile_tiny("llama")[0].graph_module
    expected: dict = {}
    for node in gm.graph.nodes:
        coded = CodedLinear.of(node)
        if coded is not None:
            energy = coded.image(gm).double().square().sum(0)
            expected[coded.quantizer.node] = expected.get(coded.quantizer.node, 0) + energy
    monkeypatch.setattr(expert_views, "IMAGE", 64 * 5)  # five rows of 64 columns at a time
    found = guard.read_energies(gm)
    assert set(found) == set(expected)
    for node, energy in found.items():
        torch.testing.assert_close(energy.double(), expected[node], rtol=1e-6, atol=0)  # sums of some hundred terms
