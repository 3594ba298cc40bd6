"""Builds of the library other than the ordinary one, driven by kernels/tests/check.c: with sanitizers, and for Arm in an emulator."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from resq_compiler.backends.cpu import library as library_module
from resq_compiler.backends.cpu.library import Library

from resq_compiler.errors import BackendError


def check_program(builder, folder, compiler, library, flags=()):
    """kernels/tests/check.c, linked with a library that lies beside it."""
    program = folder / "check"
    sources = [str(builder.SOURCES.parent / "tests" / "check.c"), f"-I{builder.SOURCES}"]
    command = [*compiler, "-O1", "-ffp-contract=off", "-Wall", "-Wextra", *flags, *sources, str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{folder}", "-o", str(program)], check=True)
    return program


def test_under_sanitizers(builder, tmp_path):
    compiler = builder.find_compiler()
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    linked = subprocess.run(
        [*compiler, *builder.SANITIZE, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if linked.returncode:
        pytest.skip("the compiler has no sanitizer libraries")
    library = builder.build(tmp_path, tmp_path / "objects", compiler, sanitize=True)
    program = check_program(builder, tmp_path, compiler, library, builder.SANITIZE)
    done = subprocess.run([str(program), "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: checked" in done.stdout


def test_arm_in_an_emulator(builder, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages gcc-aarch64-linux-gnu and qemu-user")
    library = builder.build(tmp_path, tmp_path / "objects", [compiler], "aarch64")
    program = check_program(builder, tmp_path, [compiler], library)
    command = [emulator, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(program), "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["neon_i8mm: checked", "neon_dotprod: checked", "portable: checked"]


def test_the_best_instruction_set_is_chosen(library):
    able = [name for name, supported in library.instruction_sets().items() if supported]
    assert library.selected == able[0] and able[-1] == "portable"
    with library.using("portable"):
        assert library.selected == "portable"
    assert library.selected == able[0]


def test_what_cannot_be_used_says_why(library, tmp_path, monkeypatch):
    with (
        pytest.raises(BackendError, match="instruction set 'mmx' cannot be used here; choose one of"),
        library.using("mmx"),
    ):
        pass
    (tmp_path / "broken.so").write_bytes(library.path.read_bytes()[:1000])
    with pytest.raises(
        BackendError, match="broken.so cannot be loaded .*cut short: 1000 bytes of .*pip install ./kernels"
    ):
        Library(tmp_path / "broken.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(BackendError, match="text.so cannot be loaded"):
        Library(tmp_path / "text.so")
    monkeypatch.setattr(library_module, "VERSION", 99)
    with pytest.raises(BackendError, match="interface version \\d+, expected 99; install again"):
        Library(library.path)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(library_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install ./kernels" in (library_module.unavailable() or "")
    library_module.library.cache_clear()
    with pytest.raises(BackendError, match="the CPU kernels are not installed: pip install ./kernels"):
        library_module.library()
    assert library_module.description().startswith("the CPU kernels are not installed")


def test_environment_says_which(library, monkeypatch):
    monkeypatch.setattr(library_module, "library", lambda: library)
    from resq_compiler.cli.environment import environment

    assert environment()["cpu_kernels"] == library.selected


def test_no_compiler(builder, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no C compiler .*pip install ziglang"):
        builder.find_compiler()
