"""Files of a dump: their names, how they are written, and how they are read again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resq_compiler import __version__
from resq_compiler.errors import DumpError

FORMAT, VERSION = "resq-dump", 1
MANIFEST, TIMING, PAGE = "dump.json", "timing.json", "index.html"


def json_text(value: Any) -> str:
    """Readable JSON with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_file(path: Path, content: str) -> None:
    """Write text, whole or not at all; DumpError where that is not possible."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(content, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DumpError:
    """The error for a target that cannot be written."""
    return DumpError(f"dump: cannot write {path}: {error.strerror}; give a writable directory with free space")


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a dump. Raises DumpError for what is not a dump of this version."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        found = "a directory without one" if directory.is_dir() else "a file" if directory.exists() else "nothing"
        raise DumpError(
            f"{directory}: expected a dump (a directory with {MANIFEST}), found {found}; "
            "make one with `resq inspect MODEL --dump DIR` or compile(..., dump_dir=DIR)"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DumpError(f"{path}: not a manifest of a dump; expected format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise DumpError(
            f"{path}: this dump has version {manifest.get('version')}, resq_compiler {__version__} reads version {VERSION}; "
            "dump again with this release"
        )
    return manifest


@contextlib.contextmanager
def reading(*directories: Path | str) -> Iterator[None]:
    """Inside, contents of dumps that are not as they were written are a DumpError that names the dumps."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        where = " or ".join(str(directory) for directory in directories)
        reason = f"{type(error).__name__}: {error}"
        raise DumpError(f"{where}: a file of the dump is not as it was written ({reason}); dump again") from error


def read_json(path: Path) -> Any:
    """A JSON file of a dump. Raises DumpError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DumpError(f"{path}: cannot be read as JSON ({error}); dump again") from error


def read_stage(directory: Path | str, label: str) -> list[dict[str, Any]]:
    """The node records of one stage of a dump."""
    return read_json(Path(directory) / f"{label}.json")["nodes"]


def read_optional(directory: Path | str, name: str) -> Any:
    """A JSON file of a dump, or None where it was not asked for."""
    path = Path(directory) / name
    return read_json(path) if path.is_file() else None
