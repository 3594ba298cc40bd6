"""What a compile will need, from shapes alone, and machines that do not have it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resq_compiler import api
from resq_compiler.errors import ConfigError
from resq_compiler.inspection import forecast, rates
from resq_compiler.inspection.forecast import FLOAT, Group, Shapes, check_fits, compiled_bytes, disk_problem
from resq_compiler.inspection.rates import Rates
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_model, tiny_tokens
from resq_compiler.util import machine

LLAMA_8B = Shapes(
    ((Group(6144, 4096), Group(4096, 4096), Group(28672, 4096), Group(4096, 14336)),) * 32,
    4096, 128256, 32, 8, 128, 8_030_261_248, True,
)  # fmt: skip
SPEEDS = Rates(1e12, 1e11, 1e-9, 1e-10, 1e-9, 1e-9, 1e9)


def of(shapes=LLAMA_8B, speeds=SPEEDS, processes=1, **options):
    chosen = named.choose("resq", **options)
    return forecast.forecast(shapes, chosen.settings, chosen.passes, speeds, processes)


def step(found, name):
    return next(item for item in found.steps if item.name == name)


def test_shapes_of_a_graph():
    graph, ctx = api.trace(tiny_model("llama"))
    found = Shapes.of(graph, ctx.facts.get(api.Topology))
    block = (Group(64 + 32 + 32, 64), Group(64, 64), Group(160 + 160, 64), Group(64, 160))
    frequencies = 8  # of rotary embeddings, beside the parameters
    weights = sum(p.numel() for p in tiny_model("llama").parameters()) + frequencies
    assert found == Shapes((block, block), 64, 131, 4, 2, 16, weights, True)


def test_memory_depends_on_the_largest_block_not_on_depth():
    deeper = dataclasses.replace(LLAMA_8B, blocks=LLAMA_8B.blocks * 2, all_weights=15_000_000_000)
    for one, other in zip(of().steps, of(deeper).steps, strict=True):
        assert {**one.memory, "second moments": 0} == {**other.memory, "second moments": 0}


def test_sizes_of_llama_3_8b():
    found = of(calibration_samples=64, calibration_length=512, calibration_dtype="float32")
    memory = step(found, "GPTQ").memory
    assert memory["weights of a block"] == FLOAT * 218_103_808
    assert memory["hidden states"] == FLOAT * 64 * 512 * 4096
    assert memory["Hessian"] == 10 * 14336**2
    rounded = of(calibration_samples=64, calibration_length=512, calibration_dtype="bfloat16")
    assert step(rounded, "GPTQ").memory["Hessian"] == 6 * 14336**2
    assert found.memory == forecast.BASE + sum(found.kept.values()) + max(item.bytes for item in found.steps)
    assert found.seconds == pytest.approx(sum(item.seconds for item in found.steps))
    assert of(speeds=None).seconds is None


def test_processes_share_windows_and_rows():
    one, four = of(), of(processes=4)
    assert step(four, "GPTQ").memory["hidden states"] * 4 == step(one, "GPTQ").memory["hidden states"]
    assert step(four, "GPTQ").seconds < step(one, "GPTQ").seconds and four.memory < one.memory
    assert step(one, "GPTQ").sent == 0 < step(four, "calibrate").sent < step(four, "GPTQ").sent


def test_steps_are_those_of_the_passes():
    assert [item.name for item in of().steps] == ["open and check", "calibrate", "bases", "GPTQ", "write"]
    searched = [item.name for item in of(allocation="sensitivity").steps]
    assert searched == ["open and check", "calibrate", "bases", "sensitivities", "GPTQ", "write"]
    assert [item.name for item in of(weight_method="rtn", basis="hadamard").steps] == [
        "open and check",
        "round",
        "write",
    ]


def test_weights_are_turned_where_they_are_quantized():
    """Products with bases, in float64, take most of the time of rounding; a recipe without bases has none."""
    turned, plain = of(weight_method="rtn"), of(weight_method="rtn", basis="none", down_proj="none", high_fraction=0.0)
    shapes = sum(2 * group.weights * 4096 for group in LLAMA_8B.groups)
    assert step(turned, "round").seconds - step(plain, "round").seconds == pytest.approx(shapes / SPEEDS.doubles)


def test_hidden_states_of_large_models_lie_in_files_where_memory_is_short():
    found = of(calibration_samples=512, calibration_length=2048)
    hidden = FLOAT * 512 * 2048 * 4096
    assert found.hidden == hidden and forecast.in_memory(found, 4 * hidden) == found
    short = forecast.in_memory(found, 4 * hidden - 4)
    assert short.aside == found.aside + hidden and short.memory < found.memory - hidden / 2
    assert check_fits(found, short.memory) is None


def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
    monkeypatch.setattr(forecast, "LARGE_MODEL", 10**12)  # smaller ones have no files
    found = of(calibration_samples=512, calibration_length=2048)
    assert check_fits(found, None) is None and check_fits(found, 10 * found.memory) is None
    said = check_fits(found, found.memory // 2)
    assert (
        said.startswith("memory: step `GPTQ` of this compile needs about ")
        and "ask for fewer or shorter calibration windows" in said
    )
    assert "weight_method=rtn" in check_fits(of(calibration_samples=2, calibration_length=64), 10**9)
    assert check_fits(found, None, 10**9).startswith("memory of the device: step `GPTQ`")
    assert disk_problem(10, 10, "out") is None and disk_problem(10, None, "out") is None
    assert "will have about 2.0 MB, and 1.0 MB are free in out" in disk_problem(2 * 10**6, 10**6, "out")


def test_bytes_of_a_compiled_model():
    settings = named.choose("resq").settings
    assert compiled_bytes(800, 1000, settings) == 800 * 4.5 / 8 + 4 * 200
    assert compiled_bytes(800, 1000, dataclasses.replace(settings, weight_bits=16)) == 4 * 1000
    assert compiled_bytes(800, 1000, dataclasses.replace(settings, model_megabytes=1.0)) == 10**6


def test_a_compile_that_does_not_fit_is_refused_before_its_work(monkeypatch, captured):
    monkeypatch.setattr(machine, "free_memory", lambda: 10**6)
    monkeypatch.setattr(machine, "resident_memory", lambda: 0)
    monkeypatch.setattr(api, "take", None)  # nothing was calibrated
    with pytest.raises(ConfigError, match="memory: step `.*` of this compile needs about"):
        api.compile(tiny_model("llama"), tiny_tokens(2, 24), calibration_samples=2, calibration_length=24)


def test_a_disk_without_room_for_codes_that_wait_is_refused(monkeypatch, tmp_path):
    assert of().aside == LLAMA_8B.linears + 2 * FLOAT * 128256 * 4096 and of().kept["codes"] == 0
    monkeypatch.setattr(forecast, "LARGE_MODEL", 0)
    monkeypatch.setattr(machine, "free_disk", lambda place: 1000)
    with pytest.raises(
        ConfigError, match="disk: codes and hidden states that wait in files will have about .* free in .*work"
    ):
        api.compile(
            tiny_model("llama"),
            tiny_tokens(2, 24),
            work_dir=tmp_path / "work",
            calibration_samples=2,
            calibration_length=24,
        )


def test_rates_are_positive(monkeypatch):
    monkeypatch.setattr(rates, "SIDE", 32)
    monkeypatch.setattr(rates, "LONG_ENOUGH", 0.0)
    found = rates.measure(torch.device("cpu"), torch.float32)
    values = dataclasses.asdict(found)
    assert values.pop("columns") >= 0 and all(value > 0 for value in values.values())
