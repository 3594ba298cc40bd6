"""Noise of quantizers, against a run of torch.fx's own interpreter."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import resq_compiler
from resq_compiler.inspection.noise import LARGEST, decibels, noise_by_name, quantizer_noise, ratio_db
from resq_compiler.inspection.noise_table import noise_table, places
from resq_compiler.ir import ops
from resq_compiler.tiny import tiny_model, tiny_tokens


@functools.cache
def model_of(family):
    """A compiled tiny model."""
    return resq_compiler.compile(
        tiny_model(family), tiny_tokens(4, 32), recipe="resq", weight_method="rtn", calibration_samples=4, calibration_length=32
    )  # fmt: skip


class Recorder(torch.fx.Interpreter):
    """Keeps what enters and leaves every quantizer."""

    def __init__(self, gm):
        super().__init__(gm)
        self.noise = {}

    def run_node(self, n):
        value = super().run_node(n)
        if n.target in (ops.quantize, ops.quantize_dequantize):
            image = ops.dequantize(value) if n.target is ops.quantize else value
            x = self.env[n.args[0]].double()
            self.noise[n.name] = 10 * math.log10(float(x.square().sum() / (image.double() - x).square().sum()))
        return value


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_noise_is_that_of_a_plain_run(family):
    model = model_of(family)
    ids = tiny_tokens(2, 24, seed=5)
    past = [torch.zeros(2, s.num_heads, 0, w) for s in model.cache_specs for w in (s.key_dim, s.value_dim)]
    recorder = Recorder(model.graph_module)
    recorder.run(ids, torch.ones_like(ids), torch.arange(24).expand(2, 24), *past)
    found = quantizer_noise(model.graph_module, ids)
    assert len({site.name for site in found}) == len(found) == len(recorder.noise)
    # the same float operations on the same inputs; sums in another order
    assert [site.sqnr_db for site in found] == pytest.approx(list(recorder.noise.values()), rel=1e-6)
    four = [s.sqnr_db for s in found if s.bits == 4 and s.kind == "activation"]
    eight = [s.sqnr_db for s in found if s.bits == 8]
    assert min(eight) > max(four) + 12  # four more bits are 24 dB; half of it leaves room for other widths


def test_summary_covers_every_site():
    sites = quantizer_noise(model_of("llama").graph_module, tiny_tokens(1, 16))
    found = places(sites)
    assert sum(place.sites for place in found) == len(sites)
    assert min(place.lowest_db for place in found) == min(site.sqnr_db for site in sites)
    assert "down_input.part0" in noise_table(sites)
    assert len(noise_table(sites, every=True).splitlines()) == len(sites) + 2


def test_noise_of_several_batches_is_that_of_all_tokens(monkeypatch):
    from resq_compiler.calibration import executor

    gm, ids, calls = model_of("llama").graph_module, tiny_tokens(4, 16), []
    together = quantizer_noise(gm, ids)
    monkeypatch.setattr(executor, "TOKENS_PER_BATCH", 16)
    apart = quantizer_noise(gm, ids, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # the same rows, whose energies are added in another order
    assert [s.sqnr_db for s in apart] == pytest.approx([s.sqnr_db for s in together], rel=1e-6)


def test_a_dump_has_the_same_noise_rounded_and_the_weights():
    gm, ids = model_of("llama").graph_module, tiny_tokens(1, 16)
    found = noise_by_name(gm, ids)
    quantizers = {name: entry["sqnr_db"] for name, entry in found.items() if entry["kind"] != "weight"}
    assert quantizers == {s.name: round(s.sqnr_db, 2) for s in quantizer_noise(gm, ids)}
    assert len(found) > len(quantizers)


def test_decibels():
    assert (decibels(100, 1), decibels(1, 0), decibels(0, 1)) == (20, math.inf, -math.inf)
    assert (ratio_db(2, 1), ratio_db(1, 0), ratio_db(0, 1)) == (3.01, LARGEST, -LARGEST)
