"""README and docs say what is: commands parse, scripts and links exist, tables are complete, generated pages are current."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from resq_compiler.passes import PASSES

import resq_compiler
from resq_compiler import __version__, errors
from resq_compiler.cli import main
from resq_compiler.cli.commands import COMMANDS
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import TINY_FAMILIES, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


SHELL = [
    line for page in PAGES.values() for block in blocks(page, "sh") for line in block.splitlines() if line
]  # fmt: skip


def test_readme_is_an_overview():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 150


def test_commands_parse():
    used = set()
    for line in (line for line in SHELL if line.startswith("resq ")):
        words = shlex.split(line, comments=True)[1:]
        module = importlib.import_module(f"resq_compiler.cli.commands.{words[0]}")
        main.make_parser(words[0], module).parse_args(words)
        used.add(words[0])
    assert used >= {"compile", "eval", "export", "generate", "inspect", "diff", "env"}


def test_flags_in_tables_exist():
    """In the tables that say what to choose, such as `--rank-multiple 32`."""
    compile_command = importlib.import_module("resq_compiler.cli.commands.compile")
    pages = (PAGES[ROOT / "README.md"], PAGES[DOCS / "recipes.md"])
    tables = [line for page in pages for line in page.splitlines() if line.startswith("|")]
    flags = [code for line in tables for code in re.findall(r"`(--[^`]+)`", line)]
    assert len(flags) > 10
    for words in map(shlex.split, flags):
        main.make_parser("compile", compile_command).parse_args(["compile", "MODEL", *words])


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in {line.split()[1] for line in SHELL if line.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for words in (line.split() for line in SHELL if line.startswith("python ")):
        assert words[1] == "-m" or (ROOT / words[1]).is_file(), words
        assert words[1] != "-m" or importlib.util.find_spec(words[2]), words


def anchors(text):
    """Fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    links = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [(path, *link.partition("#")[::2]) for path, link in links if "://" not in link]
    assert len(local) > 20
    for path, name, fragment in local:
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {name}"
        assert not fragment or fragment in anchors(PAGES[target]), f"{path.name}: {name}#{fragment}"


def test_every_page_is_reached_from_the_readme():
    found, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        found.add(page)
        linked = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)", PAGES[page])}
        todo += [path for path in linked if path not in found]
    assert found == set(PAGES)


@pytest.mark.parametrize("page", [path for path, text in PAGES.items() if blocks(text, "python")], ids=lambda p: p.stem)
def test_python_is_valid_and_what_it_imports_exists(page):
    trees = [ast.parse(block) for block in blocks(PAGES[page], "python")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in (node for node in imports if str(node.module).startswith("resq_compiler")):
        module = importlib.import_module(str(node.module))
        missing = [name.name for name in node.names if not hasattr(module, name.name)]
        assert missing == [], f"{page.name}: from {node.module} import {missing}"


def test_generated_pages_are_current():
    """Else run: python docs/generate.py."""
    for name, page in runpy.run_path(str(DOCS / "generate.py"))["PAGES"].items():
        assert PAGES[DOCS / name] == page(), f"docs/{name} is not what the code says; run: python docs/generate.py"


def test_every_option_recipe_and_command_is_documented():
    options, recipes = PAGES[DOCS / "options.md"], PAGES[DOCS / "recipes.md"]
    assert all(f"| `{name}` |" in options for name in CompileConfig().to_dict() if name != "recipe")
    assert all(f"`{name}`" in recipes and f"| `{name}` |" in options for name in named.RECIPES)
    assert all(f"| `resq {name}` |" in options for name in COMMANDS)


def test_every_pass_is_documented():
    page = PAGES[DOCS / "architecture.md"]
    for name in PASSES:
        assert f"| {name} |" in page, name
    assert len(TINY_FAMILIES) == 12 and "twelve tiny models" in page


def test_the_format_of_saved_models_is_documented(tmp_path):
    """Every file and every key of quantization_config."""
    page = PAGES[DOCS / "file-format.md"]
    compiled = resq_compiler.compile(tiny_model("llama"), recipe="rtn", tokenizer=tiny_tokenizer())
    compiled.save_pretrained(tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert all(f"| `{key}` |" in page for key in quantization)
    assert f'`"{quantization["format_version"]}"`' in page
    names = {path.name for path in tmp_path.iterdir() if "token" not in path.name}
    assert all(f"`{name}`" in page for name in names)


def test_every_error_is_documented():
    """A heading for each class and none beside them; below it, what its docstring says."""
    page = PAGES[DOCS / "errors.md"]
    classes = {n: v for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.ResqError)}
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == list(classes)
    for name, kind in classes.items():
        assert (kind.__doc__ or "").rstrip(".") in " ".join(sections[name].split()), name


def test_the_version_has_its_changes():
    assert f"## {__version__.partition('.dev')[0]}" in PAGES[DOCS / "CHANGELOG.md"]
