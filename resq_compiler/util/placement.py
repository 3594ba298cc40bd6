"""Put a set of files into a directory whole: written aside first, and nothing old is removed before all new is in place.

A directory that does not exist yet appears in one rename. One that exists is never renamed or removed itself, so it may be a mount
point, a symbolic link, the working directory, or lie in a directory that is not writable: the new files are written into a hidden
directory inside it, the old ones move into another, the new ones take their places, `last` at the end, and only then the old ones go.
Whoever looks in between finds no `last` (the file that others are read through), never a mixture. A failure moves everything back.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from resq_compiler.errors import CheckpointError

_PREFIX, _SUFFIX = ".resq-", ".partial"
_OF_FILE_SYSTEMS = ("lost+found",)


def contents(directory: Path) -> set[str]:
    """Names in a directory; without what file systems keep at the root of a volume, and what an interrupted call left here."""
    names = {entry.name for entry in directory.iterdir()} - set(_OF_FILE_SYSTEMS)
    return {name for name in names if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX))}


def check(directory: Path) -> None:
    """Raise OSError unless files can be put into the directory, which is made where it does not exist; leaves no trace."""
    place = directory.expanduser().resolve()
    while not place.exists():
        place = place.parent
    _aside(place).rmdir()


@contextmanager
def replacing(directory: Path, old: Collection[str], last: str) -> Iterator[Path]:
    """A directory to write into; what is in it when the block ends takes the place of the entries `old` of `directory`.

    Entries that are neither in `old` nor named as a new file stay. last: the file that is put in place after all others.
    Raises OSError: it cannot be written there. After that, or an error inside the block, `directory` is as it was. Where even
    moving back fails, a CheckpointError says where the old files are.
    """
    target = directory.expanduser().resolve()
    exists = target.exists()
    if not exists:
        target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _aside(target if exists else target.parent)
    try:
        yield fresh
        if exists:
            _exchange(target, fresh, old, last)
        else:
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _aside(place: Path) -> Path:
    """A new hidden directory."""
    path = place / f"{_PREFIX}{uuid.uuid4().hex[:8]}{_SUFFIX}"
    path.mkdir()
    return path


def _exchange(target: Path, fresh: Path, old: Collection[str], last: str) -> None:
    """Move old entries out and new ones in; a failure moves them back."""
    new = {entry.name for entry in fresh.iterdir()}
    leaving = contents(target) & (set(old) | new)
    former = _aside(target)
    moves = [(target / name, former / name) for name in sorted(leaving, key=lambda name: (name != last, name))]
    moves += [(fresh / name, target / name) for name in sorted(new, key=lambda name: (name == last, name))]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException as error:
        _move_back(done, former, error)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _move_back(done: list[tuple[Path, Path]], former: Path, reason: BaseException) -> None:
    """Undo moves, last first; CheckpointError where the file system refuses that too, so that nobody looks for lost files."""
    try:
        for source, destination in reversed(done):
            os.rename(destination, source)
        former.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{former.parent}: could not be written ({reason}), and former files could not be moved back ({error}): "
            f"they are in {former}"
        ) from error
