"""Write the pages that come from the code: options.md and passes.md. `--check` only says whether they are current.

python docs/generate.py
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from resq_compiler.passes import PASSES

from resq_compiler.cli.commands import COMMANDS
from resq_compiler.cli.commands.options import HELP
from resq_compiler.pipeline import options as pass_options
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.named import RECIPES, passes_for, resolve
from resq_compiler.recipes.settings import CHOICES, WORDS, CompileConfig, base_type

FOLDER = Path(__file__).parent

GROUPS = {
    "Bits": ("weight_bits", "activation_bits", "kv_bits", "lm_head_bits"),
    "Columns with more or fewer bits": (
        "high_fraction", "high_bits", "low_fraction", "low_bits", "site_fractions", "allocation", "average_bits",
        "model_megabytes", "rank_multiple",
    ),
    "Changes of basis": ("basis", "basis_weighting", "key_basis", "online_basis", "rotation", "down_proj"),
    "Weights": (
        "weight_method", "weight_clip", "gptq_damping", "gptq_act_order", "gptq_on_quantized_activations", "gptq_token_weighting",
    ),
    "Activations and cache": ("activation_clip", "kv_clip", "o_proj_granularity", "prefix_tokens"),
    "Calibration": ("calibration_samples", "calibration_length", "basis_samples", "calibration_dtype", "hidden_dtype", "bos", "seed"),
}  # fmt: skip
"""Headings, and the options below each."""


def options_page() -> str:
    """Every option of a compile, by what it is about, and every command."""
    fields = {field.name: field for field in dataclasses.fields(CompileConfig) if field.name != "recipe"}
    rest = tuple(name for name in fields if not any(name in names for names in GROUPS.values()))
    groups = {**GROUPS, "Other": rest} if rest else GROUPS
    sections = [
        f"## {heading}\n\n| option | default | values | |\n|---|---|---|---|\n"
        + "\n".join(_row(fields[n]) for n in names)
        for heading, names in groups.items()
    ]
    return _INTRODUCTION + "\n\n".join((*sections, _recipes(), _commands())) + "\n"


_INTRODUCTION = """# Options

<!-- written by docs/generate.py from the code; change the code, then run: python docs/generate.py -->

Every option is a keyword of `resq_compiler.compile(model, data, weight_bits=8)`, a flag of `resq compile`
(`--weight-bits 8`) and a key of a recipe file (`--config FILE`, YAML). Defaults below are those of the recipe `resq`; what other
recipes set is in the [table at the end](#what-recipes-set). Longer explanations are in [recipes.md](recipes.md).

"""


def _row(field: dataclasses.Field) -> str:
    return f"| `{field.name}` | {_shown(field.default)} | {_values(field)} | {_escaped(HELP[field.name])} |"


def _values(field: dataclasses.Field) -> str:
    if field.name in CHOICES:
        return ", ".join(_shown(choice) for choice in CHOICES[field.name])
    kinds = {"int": "whole number", "float": "number", "str": "text", "bool": "on, off", "None": "none"}
    words = [f"`{word}`" for word in WORDS.get(field.name, ())]
    alternatives = [kinds[kind] for kind in base_type(field.name).split(" | ")]
    return ", ".join([*alternatives, *words])


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"`{value}`" if value != "" else "none"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _recipes() -> str:
    rows = [
        f"| `{name}` | {', '.join(f'`{option}={value}`' for option, value in recipe.settings.items()) or 'the defaults'} |"
        for name, recipe in RECIPES.items()
    ]
    return "## What recipes set\n\n| recipe | options |\n|---|---|\n" + "\n".join(rows)


def _commands() -> str:
    rows = [f"| `resq {name}` | {text} |" for name, text in COMMANDS.items()]
    return "## Commands\n\nEach has its flags in `resq COMMAND --help`.\n\n| command | |\n|---|---|\n" + "\n".join(rows)


def passes_page() -> str:
    """Every pass with its options, and every recipe as passes."""
    recipes = "\n\n".join(f"`{name}`:\n\n```text\n{_text_form(name)}\n```" for name in RECIPES)
    return _PASSES.format(
        passes="\n".join(map(_pass_row, PASSES.values())),
        options="\n\n".join(_pass_options(kind) for kind in PASSES.values() if dataclasses.fields(kind)),
        recipes=recipes,
    )


_PASSES = """# Passes

<!-- written by docs/generate.py from the code; change the code, then run: python docs/generate.py -->

What each pass is for is in [architecture.md](architecture.md#passes). A pass needs the facts of the second column, which a pass
before it provides; a list of passes in which one is missing is refused before anything runs. `Topology` is what was found in the
graph, `ColumnPlan` says how many bits each column of each site gets, `Bases` are the changes of basis. Exact passes leave the
function of the model as it is.

| pass | needs | provides | exact |
|---|---|---|---|
{passes}

## Options

Options of a pass are the fields of its class in `resq_compiler.passes`; in text, `-` stands for `_`.

{options}

## Recipes as passes

A recipe is a tuple of passes. Options that are not named have their defaults.

{recipes}
"""


def _pass_row(kind: type[Pass]) -> str:
    facts = [", ".join(f"`{fact.__name__}`" for fact in group) for group in (kind.requires, kind.provides)]
    return f"| `{kind.name}` | {facts[0]} | {facts[1]} | {'yes' if kind.exact else 'no'} |"


def _pass_options(kind: type[Pass]) -> str:
    rows = [
        f"| `{pass_options.shown_name(field.name)}` | {_pass_default(field)} | {_pass_values(kind, field)} |"
        for field in dataclasses.fields(kind)
    ]
    return f"### {kind.name}\n\n| option | default | values |\n|---|---|---|\n" + "\n".join(rows)


def _pass_default(field: dataclasses.Field) -> str:
    value = field.default
    return "none" if value is None or str(value) == "" else f"`{pass_options.value_text(value)}`"


def _pass_values(kind: type[Pass], field: dataclasses.Field) -> str:
    allowed = pass_options.alternatives(pass_options.option_types(kind)[field.name])
    return (
        pass_options.expected(allowed, field)
        .replace("SiteShares", "shares of sites, such as `mlp=1/4,down.3=1/2@6`")
        .replace("ExpertBits", "bits of experts, such as `0=4432/8866`")
    )


def _text_form(recipe: str) -> str:
    return "\n".join(str(item) for item in passes_for(resolve(recipe)))


PAGES = {"options.md": options_page, "passes.md": passes_page}


def main() -> int:
    """Write what differs; the exit code of --check says whether anything does."""
    stale = [name for name, page in PAGES.items() if _text(FOLDER / name) != page()]
    if "--check" in sys.argv:
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(PAGES[name](), encoding="utf-8")
    return 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
