"""Give freed memory back to the operating system: weights are replaced many times during a compile.

glibc keeps what is freed below a threshold that it raises up to 32 MB by itself; activations of calibration batches then scatter
over the heap and hold hundreds of megabytes. Elsewhere these functions only collect reference cycles.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LARGE_BLOCK = 32 * 2**20  # blocks from here on are mapped, and unmapped when freed; lower costs page faults
SPARED = 16 * 2**20  # bytes that are let go of between two trims, a millisecond each
WORTH_A_FILE = 2**20  # bytes of a tensor; smaller ones are not put into files, nor are their pages let go
KEPT = (
    64 * 2**20
)  # free bytes at the end of the heap that stay until `trim`; glibc gives back what exceeds 128 KB at every free
MADV_PAGEOUT = 21  # of madvise(2), since Linux 5.4
PAGEMAP = Path("/proc/self/pagemap")  # an entry of eight bytes for every page, proc_pid_pagemap(5)
FILE_PAGE, SWAPPED = 1 << 61, 1 << 62  # bits of one
LARGE_MODEL = 256 * 2**20  # from this many bytes of float weights on, what is finished waits in files
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch looks at it when it first allocates memory of the CPU
SMALL_MODEL = 64 * 2**20  # below this many bytes a collection, up to 0.6 s in a large process, gives back nothing

_gone: int | None = None  # bytes since the last trim; None: nobody asks


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def tune_allocator() -> None:
    """From now on blocks of LARGE_BLOCK bytes go back to the system as soon as they are freed, and smaller ones at `trim`.

    Blocks that come and go are new pages each time, which takes a third of the time in pages of 2 MB: PyTorch asks for them, if it has
    not allocated anything yet.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if _glibc() is not None:
        _glibc().mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        _glibc().mallopt(M_TRIM_THRESHOLD, KEPT)


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """Inside, free pages of the heap go back whenever SPARED bytes were let go of: for what makes each tensor of a model once.

    The heap has holes of all sizes by then, hundreds of megabytes together, which the C library fills before it maps a block of any size:
    each tensor would leave its pages in another of them.
    """
    global _gone
    before, _gone = _gone, 0
    trim()
    try:
        yield
    finally:
        _gone = before
        trim()


def gone(size: int) -> None:
    """Count bytes that were let go of, inside `sparing`."""
    global _gone
    if _gone is None:
        return
    _gone += size
    if _gone >= SPARED:
        _gone = 0
        trim()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside, collections pass over all objects that exist now: hundreds of thousands, of torch and what it imports, half a second each.

    Where somebody else froze objects before, theirs must not be thawed: then nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim() -> None:
    """Return the free pages of the heap."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)


def page_out(address: int, size: int) -> None:
    """Let go of the pages of a mapped file; who looks again gets them from the system's cache, or its disk. Nothing where it cannot.

    Pages that somebody wrote to, in a mapping that is not shared, are the process's own: they go to swap, if there is any.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if _glibc() is not None and stop > start:
        advice = mmap.MADV_DONTNEED if _all_of_files(start, stop) else MADV_PAGEOUT
        _glibc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _all_of_files(start: int, stop: int) -> bool:
    """Whether the pages that are in memory between two addresses, multiples of a page, are those of files and nobody's own.

    Only where the system says so of one page at least: zeros may be an answer that a sandbox makes up.
    """
    try:
        with PAGEMAP.open("rb") as opened:
            opened.seek(start // mmap.PAGESIZE * 8)
            found = opened.read((stop - start) // mmap.PAGESIZE * 8)
    except OSError:
        return False
    if len(found) < (stop - start) // mmap.PAGESIZE * 8:
        return False
    entries = torch.frombuffer(bytearray(found), dtype=torch.int64)
    here, of_file = entries < 0, entries & FILE_PAGE != 0  # the sign is bit 63: in memory
    own = here & ~of_file | (entries & SWAPPED != 0)
    return bool((here & of_file).any()) and not bool(own.any())


def page_out_tensor(tensor: Tensor) -> None:
    """The same for a tensor of the CPU; one that lies in memory of its own stays as it is."""
    if tensor.device.type == "cpu" and tensor.nbytes >= WORTH_A_FILE and lies_in_a_file(tensor):
        page_out(tensor.data_ptr(), tensor.nbytes)


def lies_in_a_file(tensor: Tensor) -> bool:
    """Whether the first page of a tensor of the CPU is that of a mapped file: torch does not say where its memory comes from."""
    address = tensor.data_ptr()
    maps = Path("/proc/self/maps")  # lines "start-stop permissions offset device inode path", proc(5)
    if not maps.exists():
        return False
    for line in maps.read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return line.split()[4] != "0"
    return False


def release(module: nn.Module) -> None:
    """Collect reference cycles, then trim; nothing where the module's weights are small."""
    if sum(t.nbytes for t in module.state_dict().values()) >= SMALL_MODEL:
        gc.collect()
        trim()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on a device or here."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
