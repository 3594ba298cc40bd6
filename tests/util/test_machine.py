"""Free memory and disk, on systems that say it in different ways, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from resq_compiler.util import machine


def test_the_smaller_of_system_and_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.free_memory() == machine._system_memory()
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "1000000"),
        ("memory.stat", "anon 5\ninactive_file 200000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert machine.free_memory() == 2_200_000
    (tmp_path / "memory.max").write_text("max")
    assert machine.free_memory() == machine._system_memory() > 10**6


def test_systems_without_proc(monkeypatch):
    def absent(self, *_, **__):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}[name])
    assert machine.free_memory() == 7 * 4096 and machine.resident_memory() == 0

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert machine.free_memory() is None


def test_disk_of_a_directory_that_is_not_there_yet(tmp_path):
    assert machine.free_disk(tmp_path / "a" / "b") > 0
    assert machine.resident_memory() > 10**7
