"""resume.py: an interrupted compile goes on where it stopped and ends with the same bits."""

from __future__ import annotations

import errno
from unittest import mock

import pytest
import torch
from resq_compiler.passes import quantize_weights

import resq_compiler
from resq_compiler import api
from resq_compiler.calibration import executor, requests, statistics, workdir
from resq_compiler.errors import CheckpointError, ConfigError, PassError
from resq_compiler.frontend.source import weights_digest
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.tiny import tiny_model, tiny_tokens

SMALL = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}  # as compile_tiny


OPTIONS = {"passes": "canonicalize,fold-norms", "options": {"seed": 0}}


@pytest.fixture
def compile_in(captured, tmp_path):
    """compile_in(**options): llama in a work directory, with what was computed rather than read: (model, groups of weights)."""

    def run(**options):
        gptq = mock.patch.object(quantize_weights, "quantize_group", wraps=quantize_weights.quantize_group)
        with mock.patch.object(api, "capture_promised", lambda skeleton, weights: captured("llama")), gptq as calls:
            options = {"recipe": "resq", **SMALL, "work_dir": tmp_path / "work", **options}
            return resq_compiler.compile(tiny_model("llama"), tiny_tokens(4, 32), **options), calls.call_count

    return run


def stop_at(step, count):
    """A progress callback that interrupts, as Ctrl-C does."""

    def report(name, done, total):
        if name == step and done == count:
            raise KeyboardInterrupt

    return report


def assert_equal(model, other):
    ours, theirs = model.graph_module.state_dict(), other.graph_module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = tiny_tokens(2, 9)
    assert torch.equal(model(ids).logits, other(ids).logits) and model.notes == other.notes


def test_resumed_compile_is_bit_identical(compile_in, compiled, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        compile_in(progress=stop_at("calibrate", 0))
    assert {p.name for p in work.iterdir()} == {"fingerprint.json"}
    with pytest.raises(KeyboardInterrupt):
        compile_in(progress=stop_at("quantize weights", 1))
    assert {p.name for p in work.iterdir()} == {"fingerprint.json", "statistics.safetensors", "block-0000.safetensors"}
    with mock.patch.object(statistics, "observe", side_effect=AssertionError("calibrated again")):
        model, computed = compile_in()
    assert computed == 4  # block 1: q k v, o, gate up, down
    assert_equal(model, compiled("llama"))


def test_resumed_compile_is_bit_identical_where_the_stream_weighs_tokens(compile_in, compiled, tmp_path):
    """Tokens are weighed by the stream behind a linear, with the weight that is still float: nothing later may start from it."""
    option = {"gptq_token_weighting": "residual"}
    with pytest.raises(KeyboardInterrupt):
        compile_in(progress=stop_at("quantize weights", 1), **option)
    model, computed = compile_in(**option)
    assert computed == 4
    assert_equal(model, compiled("llama", **option))


def test_statistics_are_kept_whole(build, tmp_path):
    built, work = build("llama", before="compute-bases"), workdir.WorkDirectory(tmp_path / "work", {})

    def wanted():
        t = built.topology
        every = [*requests.head_moments(t), *requests.down_moments(t), *requests.down_sizes(t, "energy")]
        return [*requests.residual_moments(t), *requests.residual_peaks(t), *every]

    first, again = wanted(), wanted()
    with torch.no_grad():
        statistics.take(built.gm, first, built.ctx.windows, work, built.ctx.progress)
    with mock.patch.object(statistics, "observe", side_effect=AssertionError("calibrated again")):
        statistics.take(built.gm, again, built.ctx.windows, work, built.ctx.progress)
    for ours, theirs in zip(again, first, strict=True):
        states = ours.statistic.state(), theirs.statistic.state()
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    more = [*wanted(), *requests.down_sizes(built.topology, "peak")]
    assert not statistics.restored(more, work)  # a file that lacks one is not used


def test_another_compile_is_refused(tmp_path):
    config, model, windows = OPTIONS, weights_digest(tiny_model("llama")), tiny_tokens(4, 32)
    workdir.WorkDirectory(tmp_path, workdir.fingerprint(config, model, windows))
    workdir.WorkDirectory(tmp_path, workdir.fingerprint(config, model, windows))
    for name, other in {
        "passes": ({**OPTIONS, "passes": "canonicalize"}, model, windows),
        "weights": (config, weights_digest(tiny_model("llama-untied")), windows),
        "calibration tokens": (config, model, tiny_tokens(4, 32, seed=3)),
    }.items():
        with pytest.raises(ConfigError, match=f"differs in {name};.*another directory"):
            workdir.WorkDirectory(tmp_path, workdir.fingerprint(*other))


def test_foreign_and_damaged_directories_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ConfigError, match="holds something else"):
            workdir.WorkDirectory(path, {})
    work = workdir.WorkDirectory(tmp_path / "work", {})
    work.save("sums", {"x": torch.ones(50)}, ["a note"])
    tensors, notes = work.load("sums")
    assert notes == ["a note"] and torch.equal(tensors["x"], torch.ones(50))
    file = work.path / "sums.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="sums.safetensors: not readable.*delete this file"):
        work.load("sums")
    (work.path / "fingerprint.json").write_text("{")
    with pytest.raises(CheckpointError, match="fingerprint.json: not readable"):
        workdir.WorkDirectory(work.path, {})


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    work = workdir.WorkDirectory(tmp_path / "work", {"a": 1})

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(workdir, "save_file", half)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        work.save("sums", {"x": torch.ones(2)})
    assert [p.name for p in work.path.iterdir()] == ["fingerprint.json"] and work.load("sums") is None


def test_fingerprint_sees_every_bit_of_the_weights():
    model = tiny_model("llama")
    before = workdir.fingerprint(OPTIONS, weights_digest(model), None)
    assert workdir.fingerprint(OPTIONS, weights_digest(tiny_model("llama")), None) == before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert workdir.fingerprint(OPTIONS, weights_digest(model), None)["weights"] != before["weights"]


def test_out_of_memory_in_the_middle_goes_on_with_smaller_batches(compile_in, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "TOKENS_PER_BATCH", 128)
    whole, sizes = quantize_weights.quantize_block, []
    cut = executor.batches

    def full(gm, block, *rest):
        if block.index == 1 and max(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return whole(gm, block, *rest)

    def batches(windows):
        found = cut(windows)
        sizes.append(max(len(ids) for ids in found))
        return found

    monkeypatch.setattr(quantize_weights, "quantize_block", full)
    monkeypatch.setattr(executor, "batches", batches)
    for tokens in (64, 32):
        sizes.clear()
        with pytest.raises(PassError) as caught:
            compile_in()
        assert str(caught.value).endswith(
            "out of memory (CUDA out of memory. Tried to allocate 2 GiB.); finished work is kept: the same compile goes on from it with "
            f"batches of {tokens} tokens"
        )
    kept = {"fingerprint.json", "statistics.safetensors", "block-0000.safetensors", "batches.json"}
    assert {p.name for p in (tmp_path / "work").iterdir()} == kept
    sizes.clear()
    _, computed = compile_in()
    assert computed == 4 and set(sizes) == {1}  # block 1, a window at a time


def test_out_of_memory_with_nothing_smaller_says_what_needs_less():
    ctx = PassContext((), torch.zeros(4, 1024, dtype=torch.long))
    assert "shorter calibration windows (calibration_length) need less" in ctx.out_of_memory("full")
    ctx.calibration = torch.zeros(4, 32, dtype=torch.long)
    assert "with a work directory the next compile there runs smaller batches" in ctx.out_of_memory("full")


def test_a_damaged_size_of_batches_is_said(tmp_path):
    work = workdir.WorkDirectory(tmp_path / "work", {})
    assert work.batch_tokens() is None
    work.use_batches(256)
    assert work.batch_tokens() == 256
    (tmp_path / "work" / "batches.json").write_text("{}")
    with pytest.raises(CheckpointError, match="batches.json: not readable .*; delete this file"):
        work.batch_tokens()
