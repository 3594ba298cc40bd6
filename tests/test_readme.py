"""The README says what is: its commands parse, its tables are complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

from resq_compiler import errors
from resq_compiler.cli import main
from resq_compiler.cli.commands import COMMANDS
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import TINY_FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
SHELL = [
    line
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line
]


def test_commands_parse():
    used = set()
    for line in (line for line in SHELL if line.startswith("resq ")):
        words = shlex.split(line, comments=True)[1:]
        module = importlib.import_module(f"resq_compiler.cli.commands.{words[0]}")
        main.make_parser(words[0], module).parse_args(words)
        used.add(words[0])
    assert used >= {"compile", "eval", "generate", "inspect", "env"}


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in {line.split()[1] for line in SHELL if line.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for line in (line for line in SHELL if line.startswith("python ")):
        assert (ROOT / line.split()[1]).is_file(), line


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page.parent, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    local = [folder / link for folder, link in links if "://" not in link]
    assert len(local) >= 4 and all(path.exists() for path in local)


def test_python_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_tables_are_complete():
    for name in (*CompileConfig().to_dict(), *named.RECIPES):
        if name != "recipe":
            assert f"`{name}`" in README, name
    for item in named.passes_for(named.resolve("resq", down_proj="energy-split", average_bits=4.5)):
        assert f"| {item.name} |" in README, item.name
    for name in (n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.ResqError)):
        assert name in README, name
    assert {"eval", "compile", "demo"} <= COMMANDS.keys() and len(TINY_FAMILIES) == 12
