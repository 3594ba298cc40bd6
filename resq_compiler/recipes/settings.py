"""All options of a compile, with their defaults and their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from resq_compiler.errors import ConfigError
from resq_compiler.recipes.site_shares import Shares, parse_shares

CHOICES: dict[str, tuple[object, ...]] = {
    "weight_bits": (2, 3, 4, 5, 6, 7, 8, 16),
    "activation_bits": (2, 3, 4, 5, 6, 7, 8, 16),
    "kv_bits": (2, 3, 4, 5, 6, 7, 8, 16),
    "high_bits": (2, 3, 4, 5, 6, 7, 8),
    "low_bits": (2, 3, 4, 5, 6, 7, 8),
    "basis": ("pca", "hadamard", "outliers", "none"),
    "rotation": ("hadamard", "orthogonal", "none"),
    "down_proj": ("hadamard", "energy-split", "block-pca", "outliers", "none"),
    "weight_method": ("rtn", "gptq"),
    "weight_clip": ("mse", "hessian", "max"),
    "o_proj_granularity": ("head", "token"),
    "lm_head_bits": (None, 8),
    "basis_weighting": ("none", "readers"),
    "allocation": ("equal", "sensitivity", "widths"),
    "key_basis": ("shared", "head"),
    "gptq_token_weighting": ("none", "residual"),
    "calibration_dtype": ("auto", "float32", "bfloat16"),
    "prefix_tokens": ("none", "auto"),
}

WHOLE_NUMBERS = {
    "rank_multiple": 1, "calibration_samples": 1, "calibration_length": 1, "basis_samples": 1, "seed": None,
}  # fmt: skip
"""Options without a list of values, and the least that each may be."""

REMOVED: dict[str, object] = {
    "gptq_correction": "none", "gptq_correction_alpha": 1.0, "gptq_sweeps": 0, "basis_token_weighting": "none",
}  # fmt: skip
"""Options of versions before 0.2 that gained nothing, and their defaults."""

WORDS: dict[str, tuple[str, ...]] = {"activation_clip": ("input", "output")}
"""Words that an option takes in place of a number."""


@dataclass(frozen=True)
class CompileConfig:
    """How a model is quantized. Bits of 16 mean: stays in float.

    The main bits hold for the columns outside the high part (`high_fraction` of them, at `high_bits`) and the low part
    (`low_fraction`, at `low_bits`). Source of the method: ResQ, arXiv 2412.14363.
    """

    recipe: str = "resq"
    weight_bits: int = 4
    activation_bits: int = 4
    kv_bits: int = 4
    high_bits: int = 8
    high_fraction: float = 1 / 8
    site_fractions: str = ""
    allocation: str = "equal"
    average_bits: float | None = None
    model_megabytes: float | None = None
    low_bits: int = 2
    low_fraction: float = 0.0
    rank_multiple: int = 1
    basis: str = "pca"
    basis_weighting: str = "none"
    key_basis: str = "shared"
    rotation: str = "hadamard"
    down_proj: str = "hadamard"
    weight_method: str = "gptq"
    weight_clip: str = "mse"
    gptq_damping: float = 0.01
    gptq_act_order: bool = False
    gptq_on_quantized_activations: bool = False
    gptq_token_weighting: str = "none"
    activation_clip: float | str = 1.0
    kv_clip: float = 1.0
    o_proj_granularity: str = "head"
    prefix_tokens: str = "none"
    lm_head_bits: int | None = None
    calibration_samples: int = 64
    calibration_length: int = 512
    basis_samples: int = 16
    calibration_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, (bool, float)):  # 4.0 equals 4, but is no number of bits
                raise ConfigError(f"option {name}: expected one of {', '.join(map(str, allowed))}; got {value!r}")
        self._check_range("high_fraction", 0, 0.5)
        self._check_range("low_fraction", 0, 0.5)
        self._check_range("activation_clip", 0.1, 1)
        self._check_range("kv_clip", 0.1, 1)
        self._check_range("gptq_damping", 0, 1)
        for name, least in WHOLE_NUMBERS.items():
            self._check_whole(name, least)
        for name in ("gptq_act_order", "gptq_on_quantized_activations"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"option {name}: expected true or false; got {getattr(self, name)!r}")
        self._check_allocation()
        self.site_shares()

    def _check_allocation(self) -> None:
        if self.average_bits is not None:
            main = min(self.weight_bits, self.activation_bits, self.kv_bits)
            self._check_range(
                "average_bits", self.least_average(main), (main + self.high_bits) / 2
            )  # at most half of the columns are high
        if self.model_megabytes is not None:
            self._check_range("model_megabytes", 0, float("inf"))
            if self.average_bits is not None or self.weight_bits >= self.high_bits:
                raise ConfigError(
                    "option model_megabytes: expected no average_bits beside it, and weight_bits below high_bits; got "
                    f"average_bits={self.average_bits}, weight_bits={self.weight_bits}, high_bits={self.high_bits}"
                )
        if self.allocates and (self.basis != "pca" or self.low_fraction or self.site_fractions):
            option = next(
                (n for n in ("average_bits", "model_megabytes") if getattr(self, n) is not None), "allocation"
            )
            raise ConfigError(
                f"option {option}: shares out columns along a pca basis; expected basis=pca, low_fraction=0 and no site_fractions, or "
                f"allocation=equal without average_bits and model_megabytes; got basis={self.basis}, low_fraction={self.low_fraction}, "
                f"site_fractions={self.site_fractions!r}"
            )

    def least_average(self, main: int) -> float:
        """The average bits that a budget may go down to: a quarter of the columns at `low_bits`, where `widths` may take bits away."""
        return main - max(0, main - self.low_bits) / 4 if self.allocation == "widths" else main

    @property
    def allocates(self) -> bool:
        """Whether sites and blocks get the share of high columns that pays there; a budget asks for it too."""
        return self.allocation != "equal" or self.average_bits is not None or self.model_megabytes is not None

    def shares(self, site: str, block: int | None = None) -> Shares:
        """Of a site (of shares.SITES), in a block where blocks differ."""
        found, common = self.site_shares(), Shares(self.high_fraction, self.high_bits, self.low_fraction, self.low_bits)
        return dataclasses.replace(common, **found.get(f"{site}.{block}", found.get(site, {})))

    def site_shares(self) -> dict[str, dict[str, Any]]:
        """What `site_fractions` says: fields of Shares by site or site.block."""
        if not isinstance(self.site_fractions, str):
            raise ConfigError(f"option site_fractions: expected text such as mlp=1/4,o=0; got {self.site_fractions!r}")
        return parse_shares(self.site_fractions)

    def _check_whole(self, name: str, least: int | None) -> None:
        value = getattr(self, name)
        if type(value) is not int or (least is not None and value < least):
            what = "a whole number" if least is None else f"a whole number of at least {least}"
            raise ConfigError(f"option {name}: expected {what}; got {value!r}")

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        words = WORDS.get(name, ())
        if value in words:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            expected = " or ".join([f"a number from {low} to {high}", *words])
            raise ConfigError(f"option {name}: expected {expected}; got {value!r}")

    @property
    def scheme(self) -> str:
        """The short name users know, such as W4A4KV4."""
        return f"W{self.weight_bits}A{self.activation_bits}KV{self.kv_bits}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompileConfig:
        """Inverse of `to_dict`; an option that does not exist is a ConfigError that names the nearest one."""
        check_names(values)
        return cls(**values)


def check_names(values: dict[str, Any]) -> None:
    """Raise ConfigError for an option that does not exist."""
    import difflib

    known = [f.name for f in dataclasses.fields(CompileConfig)]
    for name in values:
        if name in REMOVED:
            raise ConfigError(f"option {name}: removed in 0.2, because it gained nothing; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "options: " + ", ".join(known)
            raise ConfigError(f"unknown option {name!r}; {hint}")


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Options written by an older version, without removed ones at their defaults. Raises ConfigError for other values of these."""
    kept = {name: value for name, value in values.items() if name not in REMOVED or value != REMOVED[name]}
    check_names({name: None for name in kept if name in REMOVED})
    return kept
