"""Every field of CompileConfig as a flag and as a key of a recipe file. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler.errors import ConfigError
from resq_compiler.recipes.settings import CHOICES, WORDS, CompileConfig, base_type, check_names, without_removed

if TYPE_CHECKING:
    from resq_compiler.recipes.named import Chosen

HELP: dict[str, str] = {
    "recipe": "named set of options: resq+, resq, quarot, quik, gptq, rtn, smoothquant, awq, llm-int8, duquant, "
    "prefixquant, omniquant, spinquant, ostquant, resq-trained, resq++, resq-cpu",
    "weight_bits": "bits of weights; 16: stay in float",
    "activation_bits": "bits of the inputs of linears; 16: stay in float",
    "kv_bits": "bits of cached keys and values; 16: stay in float",
    "high_bits": "bits of the high part; 16: stays in float (with outlier_threshold)",
    "high_fraction": "share of columns in the high part, such as 1/8; 0: none",
    "site_fractions": "shares of single sites (attention, mlp, o, down, key, value; of latent attention latent, qlatent), all but the "
    "first two also for one block: "
    "SITE[.BLOCK]=HIGH[@BITS][:LOW[@BITS]], "
    "such as mlp=1/4,o=0,down.3=1/2@6",
    "expert_bits": "bits of the weights of single experts: BLOCK=MAIN[/HIGH], a digit for every expert, such as 0=4432/8866",
    "allocation": "sensitivity: high columns go to the sites and blocks where predictions feel them most, and bits of weights to the "
    "experts; widths: at 5 to 8 bits, and low columns too",
    "average_bits": "a budget to share out in that way in any case, such as 4.5; with widths also below the main bits",
    "model_megabytes": "the same, as the size of the compiled model in MB, embeddings and all",
    "low_bits": "bits of the low part",
    "low_fraction": "share of columns in a part below the main bits; 0: none",
    "rank_multiple": "columns of the high part are a multiple of this",
    "basis": "columns are principal directions of activations (pca) or of the weights that read them (weights), random ones "
    "(hadamard), channels by their peak (outliers), or channels (none)",
    "basis_weighting": "readers: directions also count by how much the weights (for U_C the queries) that read them amplify errors",
    "online_basis": "where U_A is a product at run time (Gemma, OLMo2): one for each input of linears (own), or one for all of them",
    "key_basis": "U_C: one for all heads of a layer (shared), or for each key/value head",
    "rotation": "random rotation inside each part",
    "down_proj": "input of down projections: Hadamard transform online (hadamard), the same in two parts with the strongest "
    "channels in the high one "
    "(energy-split), principal directions of blocks of channels before it (block-pca), channels by their peak "
    "(outliers), or as it is (none)",
    "weight_method": "gptq: column by column, the rest makes up for the error; rtn: to nearest; both with a search for the scale",
    "weight_clip": "scales of weights keep the whole range (max), or lose least in the weights (mse) or in the output of the "
    "linear (hessian: gptq alone looks at it; output: rtn too)",
    "gptq_damping": "added to the diagonal of GPTQ's moment, relative to its mean",
    "gptq_act_order": "GPTQ: columns by descending energy, inside each part",
    "gptq_on_quantized_activations": "GPTQ sees activations as they are at inference, quantized",
    "expert_tokens": "of a mixture: calibration tokens that an expert needs for statistics of its own; others take those of their layer",
    "calibrate_all_experts": "of a mixture: every calibration token goes through every expert, for statistics only",
    "unreached_experts": "layer: experts without a calibration token take the statistics of their layer; error: they stop the compile",
    "calibration_routing": "of a mixture: whose choice of experts GPTQ follows, that of the float or of the quantized model",
    "gptq_token_weighting": "residual: errors of layers that write into the residual stream count relative to its size at each token",
    "activation_clip": "share of the range of activations that is kept, in parts below 8 bits; searched for each site by the error of the "
    "value (input) or of the linears that read it (output)",
    "kv_clip": "share of the range of keys and values that is kept",
    "o_proj_granularity": "a scale for each token and head, or for each token, at output projections",
    "activation_group_size": "columns of less than 8 bits that share a scale of a token at the inputs of attention and feed-forwards, "
    "about; none: a scale for each part of them",
    "prefix_tokens": "auto: tokens with massive activations are found in calibration, and their keys and values go before every sequence",
    "learn_rotations": "bases are turned further inside their parts, in steps that lower the divergence from the float model's "
    "predictions, or the cross entropy of the text",
    "learn_pairs": "beside these rotations, scales of channels between norms and linears and of hidden channels",
    "learn_blocks": "scales of weights, of channels and of ranges are learned block by block against the output of the float block",
    "learn_scales": "scales of codes, gains of norms and ranges are learned against the float model's predictions",
    "learn_codes": "beside learn_scales, the codes of weights are learned too: 20 bytes of memory for each weight of the model",
    "learning_steps": "of each of these, at most",
    "learning_rate": "the highest of their steps, codes 7/3 of it; none: the usual one of each",
    "smooth_alpha": "scales of channels, max|x|^alpha / max|W|^(1 - alpha), by which the output of norms is divided and weights are "
    "multiplied; none: there are none",
    "scale_search": "scales of channels by what rounding the weights behind them does to the output of the block",
    "outlier_threshold": "channels whose values reach it on calibration text stay at high_bits; none: high_fraction says how many do",
    "spread_outliers": "blocks of channels at the input of every linear are rotated, and channels dealt evenly to them, online",
    "activation_scales": "dynamic: for every token; static: one for all tokens, from calibration",
    "weight_group_size": "columns of a part whose weights share a scale; none: a scale for each row and part",
    "lm_head_bits": "bits of lm_head; none: it stays in float, as embeddings do",
    "calibration_samples": "windows of calibration text",
    "calibration_length": "tokens in a window",
    "basis_samples": "how many of these windows bases and the order of channels are taken from, spread evenly",
    "calibration_dtype": "of linears and second moments in calibration runs; auto: bfloat16 where the processor has it, else float32",
    "hidden_dtype": "of hidden states that are kept between two blocks in calibration runs; bfloat16 takes half the memory",
    "bos": "auto: windows of text begin with what the tokenizer puts before a text, such as a beginning-of-sequence token; never: "
    "they do not, as in papers",
    "seed": "of rotations and of self-written calibration text",
}


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """--passes, --config and one flag for each option; flags of options that are not given leave no attribute behind."""
    parser.add_argument(
        "--passes", metavar="TEXT",
        help="passes in order, in place of a recipe and its options: name{option=value,...},name,... as a dump and --dry-run show them",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="recipe file (YAML or JSON) with any of the options below")
    group = parser.add_argument_group(
        "options of the compiler (defaults are those of the recipe resq; docs/options.md lists what others set)"
    )
    for field in dataclasses.fields(CompileConfig):
        flag = "--" + field.name.replace("_", "-")
        text = f"{HELP[field.name]} (default: {_shown(field.default)})"
        if base_type(field.name) == "bool":
            group.add_argument(
                flag, dest=field.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            group.add_argument(
                flag, dest=field.name, type=_argument(field.name), default=argparse.SUPPRESS, help=text,
                metavar=_metavar(field.name, base_type(field.name)),
            )  # fmt: skip


def given_options(arguments: argparse.Namespace) -> list[str]:
    """The options that were given as flags."""
    return [f.name for f in dataclasses.fields(CompileConfig) if hasattr(arguments, f.name)]


def chosen_passes(arguments: argparse.Namespace) -> Chosen:
    """Recipe, then the file of --config, then flags; or the passes of --passes, or of `passes` in that file, with options of a run.

    Raises ConfigError.
    """
    from resq_compiler.recipes import named, text

    values = read_recipe_file(arguments.config) if arguments.config else {}
    written = values.pop("passes", None)
    values |= {n: getattr(arguments, n) for n in given_options(arguments)}
    passes = arguments.passes or written
    if passes is None:
        return named.choose(values.pop("recipe", named.DEFAULT_RECIPE), **values)
    if "recipe" in values:
        raise ConfigError("passes and recipe: each says what a compile does; give one of them")
    return named.choose(text.parse(passes), **values)


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Options from a YAML (or JSON) file. Raises ConfigError naming the file and the key."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe file {path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe file {path}: expected lines such as `weight_bits: 4`; got {type(values).__name__}")
    try:
        values = without_removed({str(name): value for name, value in values.items()})
        check_names({name: value for name, value in values.items() if name != "passes"})
        return {name: str(value) if name == "passes" else convert(name, value) for name, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f"recipe file {path}: {error}") from error


def convert(name: str, value: Any) -> Any:
    """A value of the type of the option; texts are parsed as on the command line. Raises ConfigError."""
    kind = base_type(name)
    if isinstance(value, str) and kind != "bool":
        return _parse(name, kind, value)
    expected: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    types = expected[kind.partition(" | ")[0]] + ((type(None),) if kind.endswith("None") else ())
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"option {name}: expected {kind}; got {value!r}")
    return value


def _parse(name: str, kind: str, text: str) -> Any:
    try:
        if kind == "str":
            return _known_word(name, text)
        if kind.endswith("None") and text.lower() == "none":
            return None
        if text in WORDS.get(name, ()):
            return text
        return float(Fraction(text)) if kind.startswith("float") else int(text)
    except (ValueError, ZeroDivisionError) as error:
        number = "a number, such as 0.125 or 1/8" if kind.startswith("float") else "a whole number"
        expected = ", or ".join([number, *WORDS.get(name, ())])
        raise ConfigError(f"option {name}: expected {expected}; got {text!r}") from error


def _known_word(name: str, text: str) -> str:
    choices = [str(c) for c in CHOICES.get(name, ())]
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"option {name}: expected one of {', '.join(choices)}; got {text!r}{hint}")
    return text


def _argument(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return convert(name, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _metavar(name: str, kind: str) -> str:
    if name in CHOICES:
        return "{" + ",".join(str(c).lower() if c is None else str(c) for c in CHOICES[name]) + "}"
    return "|".join([{"int": "N", "float": "X"}.get(kind.partition(" | ")[0], "NAME"), *WORDS.get(name, ())])


def _shown(value: Any) -> str:
    return {True: "on", False: "off", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
