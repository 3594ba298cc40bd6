"""Libraries for other platforms: which can be had, where they are put, and which one a machine takes."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.cpu import platforms
from resq_compiler.backends.cpu.library import Library
from resq_compiler.backends.onnx import session

from resq_compiler.errors import BackendError

NAME = "libresq_kernels.so"


def wheel(folder, name="resq_kernels-0.1.0-py3-none-manylinux2014_aarch64.whl", file=f"resq_kernels/{NAME}"):
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(file, b"the library")
    return str(folder / name)


def test_out_of_a_wheel_and_from_this_machine(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(b"ours")
    monkeypatch.setattr(libraries, "library", lambda: SimpleNamespace(path=tmp_path / NAME))
    monkeypatch.setattr(platforms, "this_platform", lambda: "linux-x86_64")
    chosen = [wheel(tmp_path), "linux-x86_64"]
    platforms.check(chosen)
    platforms.add(tmp_path / "model", chosen)
    assert (tmp_path / "model/lib/linux-aarch64" / NAME).read_bytes() == b"the library"
    assert platforms.library_in(tmp_path / "model", NAME).read_bytes() == b"ours"
    monkeypatch.setattr(platforms, "this_platform", lambda: "linux-riscv64")
    assert platforms.library_in(tmp_path / "model", NAME) == tmp_path / "model" / NAME


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("windows", "platform 'windows': expected one of linux-x86_64, linux-aarch64, or a wheel"),
        ("resq_kernels-0.1.0-py3-none-manylinux2014_aarch64.whl", "there is no such file; `make wheels`"),
        (
            "torch-2.13-py3-none-manylinux2014_aarch64.whl",
            "expected a wheel of resq_kernels for one of x86_64, aarch64",
        ),
    ],
)
def test_what_is_no_platform(name, message):
    with pytest.raises(BackendError, match=message):
        platforms.check([name])


def test_a_wheel_without_the_library(tmp_path):
    with pytest.raises(BackendError, match="the wheel has no libresq_kernels.so; build it with `make wheels`"):
        platforms.add(tmp_path / "model", [wheel(tmp_path, file="resq_kernels/__init__.py")])


def test_without_a_cross_compiler(tmp_path, builder, monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    package = SimpleNamespace(build_for=lambda platform, folder: builder.cross_compiler(platform))
    monkeypatch.setitem(sys.modules, "resq_kernels", package)
    monkeypatch.setattr(platforms, "this_platform", lambda: "linux-x86_64")
    with pytest.raises(BackendError, match="linux-aarch64 needs ziglang; run: pip install ziglang, or give a wheel"):
        platforms.add(tmp_path, ["linux-aarch64"])


def test_the_library_of_another_machine(library, tmp_path):
    """In the directory of an export it is an error that says what to do, and not a crash."""
    other = bytearray(library.path.read_bytes())
    (ours,) = struct.unpack_from("<H", other, 18)
    struct.pack_into("<H", other, 18, {62: 183, 183: 62}[ours])
    (tmp_path / NAME).write_bytes(other)
    with pytest.raises(BackendError, match="it was built for (aarch64|x86_64), this machine is"):
        Library(tmp_path / NAME)
    with pytest.raises(BackendError, match="it was built for .*; export again with `--platform linux-"):
        session.checked_library(tmp_path, NAME)


def test_processors_as_ziglang_spells_them(builder):
    assert builder.zig_flags(["-march=armv8.2-a+dotprod+i8mm", "-O2"]) == ["-mcpu=generic+v8_2a+dotprod+i8mm", "-O2"]
    with pytest.raises(SystemExit, match="platform 'plan9': expected one of linux-x86_64, linux-aarch64"):
        builder.cross_compiler("plan9")


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "machine"), [("linux-x86_64", 62), ("linux-aarch64", 183)])
def test_built_by_ziglang_for_old_systems(builder, tmp_path, platform, machine):
    pytest.importorskip("ziglang", reason="ziglang is not installed")
    compiler = builder.cross_compiler(platform)
    built = builder.build(tmp_path, tmp_path / "objects", compiler, platform.partition("-")[2])
    assert struct.unpack_from("<H", built.read_bytes(), 18) == (machine,)
    symbols = subprocess.run(
        ["readelf", "--version-info", str(built)], capture_output=True, text=True, check=True
    ).stdout
    versions = {tuple(map(int, word[6:].split("."))) for word in symbols.split() if word.startswith("GLIBC_")}
    assert versions and max(versions) <= (2, 17)
    if platform == platforms.this_platform():
        assert Library(built).selected
