"""Pages of mapped files are let go, and read again when somebody looks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from resq_compiler.util import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapped_tensors_are_told_from_others(tmp_path):
    file, size = tmp_path / "w.bin", 2 * memory.LARGE_BLOCK
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
    file, size = tmp_path / "w.bin", 2 * memory.LARGE_BLOCK
    file.write_bytes(b"\x07" * size)
    mapped = torch.from_file(str(file), shared=shared, size=size, dtype=torch.uint8)
    mapped[size // 2] = 9
    memory.page_out_tensor(mapped)
    assert mapped[size // 2] == 9 and int(mapped.sum()) == 7 * size + 2
    assert file.read_bytes().count(b"\x09") == int(shared)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
def test_pages_that_nobody_wrote_leave_the_process(tmp_path):
    file, size = tmp_path / "w.bin", 4 * memory.LARGE_BLOCK
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
