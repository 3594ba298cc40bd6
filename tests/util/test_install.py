from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from resq_compiler.util.install import install_command

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "dev"])
def test_the_command_names_packages_that_an_index_has(extra):
    pip, install, *packages = shlex.split(install_command(extra))
    assert (pip, install) == ("pip", "install")
    assert [*map(Requirement, packages)] == [*map(Requirement, EXTRAS[extra])]


def test_an_extra_that_is_not_there():
    with pytest.raises(AssertionError, match="no extra nothing"):
        install_command("nothing")


def test_no_text_asks_an_index_for_this_package():
    root = Path(__file__).parents[2]
    files = [
        p
        for top in ("resq_compiler", "passes", "backends", "docs", "README.md")
        for p in sorted((root / top).rglob("*"))
    ]
    files = [p for p in [*files, root / "README.md"] if p.suffix in (".py", ".md")]
    assert len(files) > 100
    assert not [p.name for p in files if "pip install 'resq_compiler" in p.read_text()]
