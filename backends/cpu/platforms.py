"""Libraries of kernels for platforms other than this one, to be put into an exported directory."""

from __future__ import annotations

import platform
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from resq_compiler.backends.cpu import library

from resq_compiler.errors import BackendError

PLATFORMS = ("linux-x86_64", "linux-aarch64")
FOLDER = "lib"  # of an exported directory: a folder for each platform
WHEEL_TAGS = {"x86_64": "linux-x86_64", "aarch64": "linux-aarch64"}


def this_platform() -> str:
    """Such as linux-x86_64."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(machine, machine) }"


def check(platforms: Sequence[str]) -> None:
    """Raise BackendError for what is neither a platform nor a wheel of the kernels."""
    for name in platforms:
        wheel = name.endswith(".whl")
        if wheel and wheel_platform(name) is None:
            raise BackendError(f"platform {name}: expected a wheel of resq_kernels for one of {', '.join(WHEEL_TAGS)}")
        if wheel and not Path(name).is_file():
            raise BackendError(f"platform {name}: there is no such file; `make wheels` writes wheels into dist")
        if not wheel and name not in PLATFORMS and name != this_platform():
            raise BackendError(f"platform {name!r}: expected one of {', '.join(PLATFORMS)}, or a wheel of resq_kernels")


def wheel_platform(name: str) -> str | None:
    """The platform that the name of a wheel says; None for another wheel."""
    stem = Path(name).stem
    found = [
        known for machine, known in WHEEL_TAGS.items() if stem.endswith((f"linux2014_{machine}", f"linux_{machine}"))
    ]
    return found[0] if found and stem.startswith("resq_kernels-") else None


def add(directory: Path, platforms: Sequence[str]) -> None:
    """Put a library for each platform into directory/lib/PLATFORM: this machine's, one out of a wheel, or one that ziglang compiles.

    Raises BackendError: a library cannot be had, with what to do.
    """
    for name in platforms:
        target = directory / FOLDER / (wheel_platform(name) or name)
        target.mkdir(parents=True, exist_ok=True)
        if name.endswith(".whl"):
            _unpack(Path(name), target)
        elif name == this_platform():
            shutil.copy(library.library().path, target)
        else:
            _compile(name, target)


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if Path(name).name == "libresq_kernels.so"]
        if not names:
            raise BackendError(f"platform {wheel}: the wheel has no libresq_kernels.so; build it with `make wheels`")
        (target / "libresq_kernels.so").write_bytes(archive.read(names[0]))


def _compile(name: str, target: Path) -> None:
    import resq_kernels

    try:
        built = resq_kernels.build_for(name, target)
    except SystemExit as error:
        raise BackendError(
            f"platform {name}: {str(error).removeprefix('error: ')}, or give a wheel of the kernels"
        ) from error
    shutil.rmtree(built.parent / "objects", ignore_errors=True)


def library_in(directory: Path, default: str) -> Path:
    """The library of an exported directory for this machine: of lib/PLATFORM where it is there, else the one beside the model."""
    ours = directory / FOLDER / this_platform() / default
    return ours if ours.is_file() else directory / default
