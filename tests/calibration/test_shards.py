"""Statistics taken in parts: what they add up to, and what is refused."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from resq_compiler import api
from resq_compiler.analysis.sites import Site
from resq_compiler.calibration import shards
from resq_compiler.calibration.shards import SavedStatistics, Shard
from resq_compiler.calibration.statistics import Request
from resq_compiler.errors import CheckpointError, ConfigError
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.tiny import tiny_tokens

OPTIONS = {
    "recipe": "resq+", "weight_method": "rtn", "activation_clip": 1.0, "calibration_samples": 4, "calibration_length": 24,
    "calibration_dtype": "float32",
}  # fmt: skip
ABOUT = {"passes": "a", "weights": "b", "calibration tokens": "c"}


def requests():
    return [
        Request(Site("residual"), SecondMoment("residual", 5), ()),
        Request(Site("value", 0), SecondMoment("value", 3, groups=2), ()),
        Request(Site("down", 0), Energy("down"), ()),
        Request(Site("down", 1), Peak("down"), ()),
    ]


def seen(rows):
    """Statistics of rows [n, 6]."""
    found = requests()
    for request, x in zip(found, (rows[:, :5], rows.unflatten(1, (2, 3)), rows, rows), strict=True):
        request.see(x)
    return found


@pytest.fixture
def parts(tmp_path):
    """Three parts of rows [7, 6], in two directories."""
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        shards.write(tmp_path / ("a" if i < 2 else "b"), Shard(i, 3), seen(Shard(i, 3).of(rows)), ABOUT)
    return tmp_path / "a", tmp_path / "b", rows


def test_parts_add_up(parts):
    a, b, rows = parts
    found = requests()
    SavedStatistics.open([b, a]).fill(found)
    for got, whole in zip(found, seen(rows), strict=True):
        for name, value in whole.statistic.state().items():
            torch.testing.assert_close(got.statistic.state()[name], value, rtol=1e-6, atol=1e-6)  # float32 products


def test_windows_of_a_part():
    windows = torch.arange(7)[:, None]
    assert Shard.parse("1/3").of(windows).flatten().tolist() == [1, 4]
    assert sorted(w for i in range(3) for w in Shard(i, 3).of(windows).flatten().tolist()) == list(range(7))
    with pytest.raises(ConfigError, match="shard 0/8: statistics are taken of 7 windows"):
        Shard(0, 8).of(windows)


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "1/0", "a/b"])
def test_no_part(text):
    with pytest.raises(ConfigError, match="shard: expected I/N with I from 0 to N - 1"):
        Shard.parse(text)


def test_a_part_is_missing(parts):
    with pytest.raises(ConfigError, match="1 of 3 parts are missing: 2/3"):
        SavedStatistics.open([parts[0]])


def test_a_part_is_there_twice(parts):
    with pytest.raises(ConfigError, match="part 0/3 is in .* and in "):
        SavedStatistics.open([parts[0], parts[1], parts[0]])


def test_no_parts(tmp_path):
    with pytest.raises(CheckpointError, match="no file statistics-I-of-N.json"):
        SavedStatistics.open([tmp_path])


def test_parts_of_different_runs(parts):
    file = parts[1] / "statistics-0002-of-0003.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "weights": "other", "calibration tokens": "other"}))
    with pytest.raises(
        ConfigError, match="are of different runs: they differ in calibration tokens, weights; take them"
    ):
        SavedStatistics.open(parts[:2])


def test_parts_of_runs_of_different_length(parts):
    shards.write(parts[1], Shard(0, 2), seen(parts[2]), ABOUT)
    with pytest.raises(ConfigError, match="parts of 2 and of 3 are together"):
        SavedStatistics.open(parts[:2])


def test_another_compile(parts):
    with pytest.raises(ConfigError, match="taken for another compile: they differ in weights; "):
        SavedStatistics.open(parts[:2]).check({**ABOUT, "weights": "other"})


@pytest.mark.parametrize("damage", ["json", "tensors", "lacks"])
def test_damaged_parts(parts, damage):
    file = parts[1] / "statistics-0002-of-0003.json"
    tensors = file.with_suffix(".safetensors")
    if damage == "json":
        file.write_text("{")
    elif damage == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:100])
    else:
        save_file({k: v for k, v in load_file(tensors).items() if "Peak" not in k}, tensors)
    with pytest.raises(
        CheckpointError, match="statistics-0002-of-0003.*(not readable|lacks Peak).*write the part again"
    ):
        SavedStatistics.open(parts[:2]).fill(requests())


def test_nothing_is_left_of_a_part_that_was_not_written(tmp_path):
    (tmp_path / "statistics-0000-of-0001.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        shards.write(tmp_path, Shard(0, 1), seen(torch.ones(2, 6)), ABOUT)
    assert [f.name for f in tmp_path.iterdir()] == ["statistics-0000-of-0001.safetensors"]


@pytest.fixture
def quick(captured):
    with mock.patch.object(api, "capture_promised", lambda skeleton, weights: captured("llama")):
        yield


def codes(compiled):
    return {name: t.tolist() for name, t in compiled.graph_module.state_dict().items()}


def test_a_compile_from_one_part_is_that_without(quick, tiny, tmp_path):
    tokens = tiny_tokens(4, 24)
    api.calibrate(tiny("llama"), tokens, tmp_path, **OPTIONS)
    ours = api.compile(tiny("llama"), tokens, statistics=tmp_path, **OPTIONS)
    assert codes(ours) == codes(api.compile(tiny("llama"), tokens, **OPTIONS))
    assert any("statistics from 1 files" in note for note in ours.notes)
    with pytest.raises(ConfigError, match="they differ in calibration tokens, options"):
        api.compile(tiny("llama"), tiny_tokens(4, 24, seed=1), statistics=tmp_path, **{**OPTIONS, "seed": 1})


def test_moments_of_two_parts_are_those_of_one_run(quick, tiny, tmp_path):
    for name, part in (("one", "0/1"), ("two", "0/2"), ("two", "1/2")):
        api.calibrate(tiny("llama"), tiny_tokens(4, 24), tmp_path / name, part, **OPTIONS)
    whole = load_file(tmp_path / "one" / "statistics-0000-of-0001.safetensors")
    halves = [load_file(tmp_path / "two" / f"statistics-000{i}-of-0002.safetensors") for i in (0, 1)]
    for name, value in whole.items():
        got = (
            torch.maximum(halves[0][name], halves[1][name]) if "largest" in name else halves[0][name] + halves[1][name]
        )
        assert float((got - value).abs().max()) <= 1e-6 * float(value.abs().max()), name


def test_nothing_to_take(quick, tiny, tmp_path):
    with pytest.raises(ConfigError, match="no pass of this recipe asks for statistics"):
        api.calibrate(
            tiny("llama"), tiny_tokens(4, 24), tmp_path, recipe="gptq", calibration_samples=4, calibration_length=24
        )
