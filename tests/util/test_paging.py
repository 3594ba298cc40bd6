"""Pages of mapped files are let go, and read again when somebody looks."""

from __future__ import annotations

import sys

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
