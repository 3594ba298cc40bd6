"""How to install what an optional part needs: resq_compiler is on no package index, the packages it uses are."""

from __future__ import annotations

import importlib.metadata
import re
import shlex


def install_command(extra: str) -> str:
    """`pip install ...` with the packages of an extra of pyproject.toml and the versions that it asks for.

    Raises AssertionError when there is no such extra.
    """
    wanted = [line.partition(";") for line in importlib.metadata.requires("resq_compiler") or ()]
    packages = [name.strip() for name, _, marker in wanted if re.fullmatch(rf"\s*extra == ['\"]{extra}['\"]", marker)]
    if not packages:
        raise AssertionError(f"pyproject.toml has no extra {extra}")
    return shlex.join(["pip", "install", *packages])
