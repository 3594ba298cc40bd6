"""What this machine has: memory and disk that are free."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that a process can still get: what the system says is available, or less where a control group has a limit; None: not known."""
    found = [size for size in (_system_memory(), _group_memory()) if size is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # not Linux
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return None


def _group_memory() -> int | None:
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((CGROUP / "memory.current").read_text())
        lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = next((int(size) for name, size in lines if name == "inactive_file"), 0)  # given back when asked for
        return max(limit - used + files, 0)
    except (OSError, ValueError):
        return None


def resident_memory() -> int:
    """Bytes that this process has in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def free_disk(place: Path) -> int | None:
    """Bytes that can be written into a directory that is there, or will be; None: not known."""
    place = place.expanduser().absolute()
    existing = next((p for p in (place, *place.parents) if p.exists()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None
