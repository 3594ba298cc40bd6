"""`torchrun -m resq_compiler compile`: one process writes, one tells of an error, and a process that dies ends the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_compiler.cli import launched
from resq_compiler.errors import ModelError, ProcessError
from resq_compiler.tiny import tiny_model, tiny_tokenizer
from resq_compiler.util import processes

ROOT = Path(__file__).parent.parent.parent
FAST = ("--calibration-samples", "4", "--calibration-length", "24", "--recipe", "resq")


class Group:
    """Processes that have found each other; `told` of them have told of an error."""

    rank, size, group, told, left = 1, 2, None, 0, False

    def __init__(self, cuda: bool):
        Group.cuda = cuda

    def speaks_first(self) -> bool:
        Group.told += 1
        return Group.told == 1

    def leave(self) -> None:
        Group.left = True


@pytest.fixture
def started(monkeypatch):
    """As torchrun starts the second of two processes."""
    Group.told, Group.left = 0, False
    monkeypatch.setattr(processes, "Launched", Group)
    for name in (*processes.LAUNCHED, "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")


def arguments(device="cpu"):
    return type("Arguments", (), {"device": device, "quiet": False})()


def test_without_torchrun_there_is_no_group():
    with launched.joined(arguments()) as group:
        assert group is None


def test_all_but_the_first_are_quiet_and_have_a_gpu_each(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, device in (("cpu", "cpu"), ("cuda", "cuda:1"), ("auto", "cuda:1"), ("cuda:0", "cuda:0")):
        given = arguments(name)
        with launched.joined(given):
            pass
        assert (given.device, given.quiet, Group.cuda, Group.left) == (device, True, device != "cpu", True)


def test_one_tells_of_an_error_that_all_meet(started):
    with pytest.raises(ModelError, match="no such"), launched.joined(arguments()):
        raise ModelError("no such model")
    with pytest.raises(launched.AlreadyTold), launched.joined(arguments()):
        raise ModelError("no such model")
    assert not Group.left


def test_a_process_that_is_stopped_says_that_another_may_have_ended(started):
    with pytest.raises(ProcessError, match="process 1 of 2: stopped by an interruption, or because"):  # noqa: SIM117
        with launched.joined(arguments()):
            raise KeyboardInterrupt
    with pytest.raises(launched.AlreadyTold), launched.joined(arguments()):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """torchrun(*arguments, before="") -> CompletedProcess of `resq compile` of a tiny model in two processes, behind some Python."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("some words of a text that is long enough " * 200)

    def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
        (folder / "command.py").write_text(
            f"import os, sys\n{before}\nfrom resq_compiler.cli.main import main\nsys.exit(main())\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.run(
            [*command, "command.py", "compile", *arguments, "--calibration", "text.txt", *FAST],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return folder, run


@pytest.mark.slow
def test_two_processes_write_one_model(torchrun):
    folder, run = torchrun
    done = run("model", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out") == 1 and "computed by 2 processes" in done.stdout
    assert (folder / "out" / "config.json").is_file()


@pytest.mark.slow
def test_one_error_for_all(torchrun):
    _, run = torchrun
    done = run("no/such/model", "-o", "out2")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "no/such/model" in done.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_work_goes_on(torchrun):
    folder, run = torchrun
    dies = (
        "import resq_compiler.passes.quantize_weights as q\n"
        "kept = q.quantize_block\n"
        "def block(gm, block, *rest):\n"
        "    if os.environ['RANK'] == '1' and block.index == 1:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return kept(gm, block, *rest)\n"
        "q.quantize_block = block\n"
    )
    done = run("model", "-o", "out3", "--work-dir", "work", before=dies)
    assert done.returncode != 0 and not (folder / "out3").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the same command goes on from it" in errors[0]
    assert (folder / "work" / "block-0000.safetensors").is_file()
    assert run("model", "-o", "out3", "--work-dir", "work").returncode == 0
