"""One process that shares with nobody, parts and rows of several, and what is said when another one is gone."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import ConfigError, ProcessError
from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.shared_weights import quantize_shared
from resq_compiler.numerics.weights import quantize_weight_rtn
from resq_compiler.util import processes
from resq_compiler.util.processes import ALONE, Processes


def test_one_process_has_everything():
    windows = torch.arange(6).reshape(3, 2)
    assert processes.current() is ALONE and ALONE.is_first
    assert ALONE.part(windows).equal(windows) and ALONE.rows(5) == slice(0, 5)
    assert (
        ALONE.sum(windows) is windows and ALONE.from_first(windows) is windows and ALONE.join_rows(windows) is windows
    )
    assert ALONE.agreed("a") == "a" and ALONE.every(1) == [1]
    assert ALONE.tensors_of_first(None) is None and ALONE.tensors_of_first({"a": windows}) == {"a": windows}


def test_parts_and_rows_cover_all_without_overlap():
    windows = torch.arange(14).reshape(7, 2)
    shared = [Processes(rank, 3) for rank in range(3)]
    assert sorted(row for one in shared for row in one.part(windows)[:, 0].tolist()) == windows[:, 0].tolist()
    assert [shared[0].rows(7, rank) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert [shared[0].rows(2, rank) for rank in range(3)] == [slice(0, 0), slice(0, 1), slice(1, 2)]


def test_more_processes_than_windows_are_refused():
    with pytest.raises(ConfigError, match="4 processes share 3 calibration windows; start at most as many"):
        Processes(0, 4).part(torch.zeros(3, 2))


@pytest.mark.parametrize("group_size", [None, 3])
@pytest.mark.parametrize("rows", [7, 2])
def test_shared_rows_are_those_of_one_process(monkeypatch, group_size, rows):
    """Ranks one after the other; what a rank fills in is what the others get."""
    weight = torch.randn(rows, 10, generator=torch.Generator().manual_seed(0))
    parts = [Part(4, 0, 6), Part(8, 6, 10)]

    def quantize(w):
        return quantize_weight_rtn(w, parts, group_size=group_size)

    found = []
    for rank in range(3):
        alone = Processes(rank, 3)
        monkeypatch.setattr(processes, "_current", alone)
        monkeypatch.setattr(Processes, "join_rows", lambda self, whole: whole[self.rows(rows)])
        found.append(quantize_shared(weight, parts, group_size, quantize))
    for i, expected in enumerate(quantize(weight)):
        assert torch.equal(torch.cat([made[i].qdata for made in found]), expected.qdata)
        assert torch.equal(torch.cat([made[i].scale for made in found]), expected.scale)
        assert {(made[i].bits, made[i].group_size) for made in found} == {(expected.bits, expected.group_size)}


def test_another_process_that_is_gone_is_said_in_one_sentence(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234\nC++ frames")

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(ProcessError) as caught:
        Processes(1, 2).sum(torch.zeros(3))
    assert str(caught.value).startswith(
        "process 1 of 2: another process ended or does not answer (Connection closed by peer [127.0.0.1]:1234); see what it said."
    )


def test_launched_says_what_torchrun_says(monkeypatch):
    for name in processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert not processes.launched()
    for name in processes.LAUNCHED:
        monkeypatch.setenv(name, "1")
    assert processes.launched()
