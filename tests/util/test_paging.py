"""Pages of mapped files are let go, and read again when somebody looks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from resq_compiler.util import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapped_tensors_are_told_from_others(tmp_path):
    file, size = tmp_path / "w.bin", 16 * memory.WORTH_A_FILE
    file.write_bytes(b"\x07" * size)
    mapped, own = torch.from_file(str(file), size=size, dtype=torch.uint8), torch.full((size,), 7, dtype=torch.uint8)
    assert memory.lies_in_a_file(mapped) and not memory.lies_in_a_file(own)
    for value in (mapped, own):
        memory.page_out_tensor(value)
        assert bool((value == 7).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
@pytest.mark.parametrize("shared", [False, True])
def test_what_was_written_to_a_mapped_tensor_stays(tmp_path, shared):
    """A model in memory may lie in its file and be changed all the same: those pages are its own."""
    file, size = tmp_path / "w.bin", 16 * memory.WORTH_A_FILE
    file.write_bytes(b"\x07" * size)
    mapped = torch.from_file(str(file), shared=shared, size=size, dtype=torch.uint8)
    mapped[size // 2] = 9
    memory.page_out_tensor(mapped)
    assert mapped[size // 2] == 9 and int(mapped.sum()) == 7 * size + 2
    assert file.read_bytes().count(b"\x09") == int(shared)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
def test_pages_that_nobody_wrote_leave_the_process(tmp_path):
    file, size = tmp_path / "w.bin", 16 * memory.WORTH_A_FILE
    file.write_bytes(b"\x07" * size)
    mapped = torch.from_file(str(file), size=size, dtype=torch.uint8)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().split(str(file))[1].splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))

    mapped.sum()
    assert resident() > size // 2
    memory.page_out_tensor(mapped)
    assert resident() <= 2 * 2**21  # pages at the ends, which may be large
    assert int(mapped.sum()) == 7 * size


class Table:
    """A pagemap that says the same of every page; None: there is none."""

    def __init__(self, entry: bytes | None):
        self.entry = entry

    def open(self, mode: str) -> Table:
        if self.entry is None:
            raise FileNotFoundError
        return self

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seek(self, place: int) -> None:
        pass

    def read(self, size: int) -> bytes:
        return self.entry * (size // 8)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
@pytest.mark.parametrize("entry", [None, b"", bytes(8)], ids=["absent", "cut short", "zeros"])
def test_what_was_written_stays_where_the_system_does_not_tell(tmp_path, monkeypatch, entry):
    """A sandbox may have no pagemap, or one that says nothing of the pages."""
    file, size = tmp_path / "w.bin", 16 * memory.WORTH_A_FILE
    file.write_bytes(b"\x07" * size)
    mapped = torch.from_file(str(file), size=size, dtype=torch.uint8)
    mapped[:] = 9
    monkeypatch.setattr(memory, "PAGEMAP", Table(entry))
    memory.page_out_tensor(mapped)
    assert bool((mapped == 9).all())
