"""Several processes that share a compile: the same bytes in each, the same model as one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two gloo processes found, and where."""
    directory = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(ROOT / "tests" / "processes_worker.py"), str(directory)]
    started = [
        subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)], directory


def test_all_have_the_same_bytes_also_after_an_interruption(two):
    (first, second), directory = two
    assert {*first["digests"], *second["digests"]} == {first["digests"][0]}
    kept = {file.name for file in (directory / "work").iterdir()}
    assert kept == {"fingerprint.json", "statistics.safetensors", "block-0000.safetensors", "block-0001.safetensors"}


def test_sums_are_those_of_one_process(two):
    _, directory = two
    together, alone = (load_file(directory / name / "statistics.safetensors") for name in ("work", "alone"))
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        # float32 products of another number of tokens: the order of additions
        assert float((together[name] - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name


def test_they_make_what_one_process_makes(two):
    (first, second), _ = two
    alone, together, exact = (torch.tensor(first[name]) for name in ("alone", "logits", "float"))
    assert torch.equal(together, torch.tensor(second["logits"]))
    # the order of additions moves a few codes by a step: far less than what quantizing does to these logits
    assert float((together - alone).norm()) < float((alone - exact).norm()) / 4


def test_the_result_says_so(two):
    (first, _), _ = two
    assert sum(note.startswith("computed by 2 processes, which sent ") for note in first["notes"]) == 1


def test_processes_that_do_different_work_are_refused_in_each(two):
    for found in two[0]:
        assert found["refused"] == (
            "process 1 of 2 differs from process 0 in calibration tokens: 'text 1' and 'text 0'; give all of them the same command, "
            "model, text and versions"
        )
