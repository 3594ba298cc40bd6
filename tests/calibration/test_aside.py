"""Hidden states in files: the same values, and nothing that stays behind."""

from __future__ import annotations

import pytest
import torch

import resq_compiler
from resq_compiler.calibration import aside, workdir
from resq_compiler.errors import CheckpointError
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_model, tiny_tokens
from resq_compiler.util import machine, memory


@pytest.fixture
def short(monkeypatch):
    """A machine with no memory to speak of, on which no tensor is too small for a file."""
    monkeypatch.setattr(machine, "free_memory", lambda: 1)
    monkeypatch.setattr(memory, "WORTH_A_FILE", 1)


@pytest.mark.parametrize("value", [torch.arange(60.0).reshape(3, 4, 5).mT, torch.arange(9, dtype=torch.int8)])
def test_a_tensor_in_a_file(short, tmp_path, value):
    found = aside.put_aside(value, tmp_path)
    assert torch.equal(found, value) and found.dtype == value.dtype and memory.lies_in_a_file(found)
    assert not list(tmp_path.iterdir())
    aside.let_go([found, (1, 2)])
    assert torch.equal(found, value)


def test_what_stays_in_memory(short, tmp_path, monkeypatch):
    value = torch.ones(64)
    assert aside.put_aside(value, None) is value and aside.put_aside((value,), tmp_path)[0] is value
    work = workdir.WorkDirectory(tmp_path, {})
    assert aside.directory_for(100, work) == tmp_path and aside.directory_for(100, None) is None
    monkeypatch.setattr(machine, "free_memory", lambda: 400)
    assert aside.directory_for(100, work) is None and aside.directory_for(101, work) == tmp_path
    monkeypatch.setattr(memory, "WORTH_A_FILE", 1024)
    assert aside.put_aside(value, tmp_path) is value  # small


def test_a_disk_without_room(short, tmp_path):
    with pytest.raises(
        CheckpointError, match="hidden states could not be written .*; make room, or ask for fewer calibration"
    ):
        aside.put_aside(torch.ones(64), tmp_path / "absent")


def test_a_compile_with_hidden_states_in_files(short, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(resq_compiler.api.forecast, "check_fits", lambda *_: None)
    used = []
    monkeypatch.setattr(aside, "let_go", lambda values: used.append(all(map(memory.lies_in_a_file, values))))
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}
    found = resq_compiler.compile(
        tiny_model("llama"), tiny_tokens(4, 32), recipe="resq", work_dir=tmp_path / "w", **options
    )
    ours, theirs = found.graph_module.state_dict(), compiled("llama", recipe="resq").graph_module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert used and all(used) and not list((tmp_path / "w").glob(".hidden*"))


def test_bfloat16_is_kept_and_float32_worked_with():
    value = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with aside.kept_in("bfloat16"):
        kept = aside.narrow(value)
        assert kept.dtype == torch.bfloat16 and torch.equal(aside.wide(kept), value.bfloat16().float())
        assert aside.narrow(value.double()).dtype == torch.float64 and aside.narrow((value,)) == (value,)
    assert aside.narrow(value) is value and aside.wide(value) is value


def test_a_compile_with_hidden_states_in_bfloat16(compiled, tiny):
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}
    bits = {"weight_bits": 8, "activation_bits": 8, "kv_bits": 8}
    found = resq_compiler.compile(
        tiny_model("llama"), tiny_tokens(4, 32), recipe="resq", hidden_dtype="bfloat16", **bits, **options
    )
    ids = tiny_tokens(2, 24, seed=1)
    with torch.no_grad():
        expected = tiny("llama")(ids).logits
    plain = compiled("llama", recipe="resq", **bits)
    errors = [relative_error(model(ids).logits, expected) for model in (found, plain)]
    assert not torch.equal(found(ids).logits, plain(ids).logits) and errors[0] < 1.2 * errors[1]
    assert found.options.hidden_dtype == "bfloat16"
