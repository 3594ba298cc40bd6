"""All options of a compile, with their defaults and their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from resq_compiler.analysis.expert_bits import ExpertBits
from resq_compiler.analysis.site_shares import SiteShares, least_average
from resq_compiler.errors import ConfigError

MainBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
PartBits = Literal[2, 3, 4, 5, 6, 7, 8]
HighBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]

WHOLE_NUMBERS = {
    "rank_multiple": 1, "learning_steps": 1,
    "calibration_samples": 1, "calibration_length": 1, "basis_samples": 1, "expert_tokens": 1,
    "seed": None,
}  # fmt: skip
"""Options without a list of values, and the least that each may be."""

RUN_OPTIONS = (
    "calibration_samples", "calibration_length", "basis_samples", "calibration_dtype", "hidden_dtype", "bos", "seed",
)  # fmt: skip
"""Options that are no pass's own: of the calibration run, and of all draws."""

GIVEN = "passes"
"""The name of the recipe where the passes themselves were given: other options than those of a run mean nothing then."""

LEARNING = ("learn_rotations", "learn_pairs", "learn_blocks", "learn_scales", "learn_codes")
"""Options that learn something."""

REMOVED: dict[str, object] = {
    "gptq_correction": "none", "gptq_correction_alpha": 1.0, "gptq_sweeps": 0, "basis_token_weighting": "none", "learning_windows": 0,
}  # fmt: skip
"""Options of versions before 0.2 that gained nothing, and their defaults."""


@dataclass(frozen=True)
class CompileConfig:
    """How a model is quantized. Bits of 16 mean: stays in float.

    The main bits hold for the columns outside the high part (`high_fraction` of them, at `high_bits`) and the low part
    (`low_fraction`, at `low_bits`). Source of the method: ResQ, arXiv 2412.14363.
    """

    recipe: str = "resq"
    weight_bits: MainBits = 4
    activation_bits: MainBits = 4
    kv_bits: MainBits = 4
    high_bits: HighBits = 8
    high_fraction: float = 1 / 8
    site_fractions: str = ""
    expert_bits: str = ""
    allocation: Literal["equal", "sensitivity", "widths"] = "equal"
    average_bits: float | None = None
    model_megabytes: float | None = None
    low_bits: PartBits = 2
    low_fraction: float = 0.0
    rank_multiple: int = 1
    basis: Literal["pca", "weights", "hadamard", "outliers", "none"] = "pca"
    basis_weighting: Literal["none", "readers"] = "none"
    key_basis: Literal["shared", "head"] = "shared"
    online_basis: Literal["own", "shared"] = "own"
    rotation: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    down_proj: Literal["hadamard", "energy-split", "block-pca", "outliers", "none"] = "hadamard"
    weight_method: Literal["rtn", "gptq"] = "gptq"
    smooth_alpha: float | None = None
    scale_search: bool = False
    outlier_threshold: float | None = None
    spread_outliers: bool = False
    weight_clip: Literal["mse", "hessian", "output", "max"] = "mse"
    gptq_damping: float = 0.01
    gptq_act_order: bool = False
    gptq_on_quantized_activations: bool = False
    gptq_token_weighting: Literal["none", "residual"] = "none"
    expert_tokens: int = 128
    calibrate_all_experts: bool = False
    unreached_experts: Literal["error", "layer"] = "error"
    calibration_routing: Literal["float", "quantized"] = "float"
    activation_clip: float | Literal["input", "output"] = 1.0
    activation_scales: Literal["dynamic", "static"] = "dynamic"
    kv_clip: float = 1.0
    o_proj_granularity: Literal["head", "token"] = "head"
    activation_group_size: Literal[32, 64, 128] | None = None
    prefix_tokens: Literal["none", "auto"] = "none"
    learn_rotations: Literal["none", "divergence", "cross-entropy"] = "none"
    learn_pairs: bool = False
    learn_blocks: bool = False
    learn_scales: bool = False
    learn_codes: bool = False
    learning_steps: int = 100
    learning_rate: float | None = None
    weight_group_size: Literal[32, 64, 128] | None = None
    lm_head_bits: Literal[8] | None = None
    calibration_samples: int = 64
    calibration_length: int = 512
    basis_samples: int = 16
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    hidden_dtype: Literal["float32", "bfloat16"] = "float32"
    bos: Literal["auto", "never"] = "auto"
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
        for name in (
            "gptq_act_order",
            "gptq_on_quantized_activations",
            "scale_search",
            "spread_outliers",
            "calibrate_all_experts",
            *LEARNING[1:],
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"option {name}: expected true or false; got {getattr(self, name)!r}")
        self._check_allocation()
        self._check_combinations()
        if not isinstance(self.site_fractions, str):
            raise ConfigError(f"option site_fractions: expected text such as mlp=1/4,o=0; got {self.site_fractions!r}")
        if not isinstance(self.expert_bits, str):
            raise ConfigError(f"option expert_bits: expected text such as 0=4432/8866; got {self.expert_bits!r}")
        SiteShares.parse(self.site_fractions)
        ExpertBits.parse(self.expert_bits)

    def _check_allocation(self) -> None:
        if self.average_bits is not None:
            main = min(self.weight_bits, self.activation_bits, self.kv_bits)
            least = least_average(main, self.low_bits, self.allocation == "widths")
            self._check_range(
                "average_bits", least, (main + self.high_bits) / 2
            )  # at most half of the columns are high
        if self.model_megabytes is not None:
            self._check_range("model_megabytes", 0, float("inf"))
            if self.average_bits is not None or self.weight_bits >= self.high_bits:
                raise ConfigError(
                    "option model_megabytes: expected no average_bits beside it, and weight_bits below high_bits; got "
                    f"average_bits={self.average_bits}, weight_bits={self.weight_bits}, high_bits={self.high_bits}"
                )
        stated = next((n for n in ("site_fractions", "expert_bits") if getattr(self, n)), "site_fractions")
        if self.allocates and (self.basis != "pca" or self.low_fraction or getattr(self, stated)):
            option = next(
                (n for n in ("average_bits", "model_megabytes") if getattr(self, n) is not None), "allocation"
            )
            raise ConfigError(
                f"option {option}: shares out columns along a pca basis; expected basis=pca, low_fraction=0 and no {stated}, or "
                f"allocation=equal without average_bits and model_megabytes; got basis={self.basis}, low_fraction={self.low_fraction}, "
                f"{stated}={getattr(self, stated)!r}"
            )

    def _check_combinations(self) -> None:
        """Options that say something only beside certain others."""
        for name, most in (("smooth_alpha", 1.0), ("outlier_threshold", float("inf")), ("learning_rate", float("inf"))):
            if getattr(self, name) is not None:
                self._check_range(name, 0, most)
        scaled, plain = ("none", "outliers"), {"basis": ("none",), "down_proj": ("none",), "high_fraction": (0.0,)}
        learned: dict[str, tuple[object, ...]] = {
            "gptq_on_quantized_activations": (True,),
            "activation_scales": ("dynamic",),
        }
        rules: tuple[tuple[str, object, dict[str, tuple[object, ...]]], ...] = (
            ("smooth_alpha", None, {"basis": scaled}),
            ("scale_search", False, {"basis": scaled}),
            ("spread_outliers", False, {**plain, "outlier_threshold": (None,)}),
            ("outlier_threshold", None, {"basis": ("outliers",), "allocation": ("equal",), "average_bits": (None,),
                                         "model_megabytes": (None,), "high_fraction": (0.0,)}),
            ("activation_group_size", None, {"activation_scales": ("dynamic",)}),
            ("learn_rotations", "none", {**learned, "basis": ("pca", "weights", "hadamard")}),
            ("learn_pairs", False, {"learn_rotations": ("divergence", "cross-entropy")}),
            ("learn_blocks", False, {**learned, "weight_method": ("rtn",), "learn_scales": (False,)}),
            ("learn_scales", False, learned),
            ("learn_codes", False, {"learn_scales": (True,)}),
        )  # fmt: skip
        for name, usual, needed in rules:
            for other, allowed in needed.items() if getattr(self, name) != usual else ():
                if getattr(self, other) not in allowed:
                    raise ConfigError(
                        f"option {name}: expected {other}={' or '.join(map(str, allowed))} beside it; got {other}={getattr(self, other)}"
                    )
        if self.high_bits == 16 and self.high_fraction:
            raise ConfigError(
                f"option high_bits: 16 is for channels that outlier_threshold names; expected high_fraction=0, got {self.high_fraction}"
            )

    @property
    def allocates(self) -> bool:
        """Whether sites and blocks get the share of high columns that pays there; a budget asks for it too."""
        return self.allocation != "equal" or self.average_bits is not None or self.model_megabytes is not None

    @property
    def sites(self) -> SiteShares:
        """What `site_fractions` says."""
        return SiteShares.parse(self.site_fractions)

    @property
    def experts(self) -> ExpertBits:
        """What `expert_bits` says."""
        return ExpertBits.parse(self.expert_bits)

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


def alternatives(name: str) -> tuple[Any, ...]:
    """The types that an option may have, in the order of its annotation."""
    hint = _HINTS[name]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def words(name: str) -> tuple[object, ...]:
    """The values that an option names one by one: whole numbers, or words."""
    return tuple(value for kind in alternatives(name) if get_origin(kind) is Literal for value in get_args(kind))


def base_type(name: str) -> str:
    """bool, int, float or str, with ` | None` where the option may be none."""
    kinds = [type(get_args(k)[0]) if get_origin(k) is Literal else k for k in alternatives(name)]
    return kinds[0].__name__ + (" | None" if type(None) in kinds else "")


_HINTS = get_type_hints(CompileConfig)

CHOICES: dict[str, tuple[object, ...]] = {
    name: (*((None,) if base_type(name).endswith("None") else ()), *words(name))
    for name in _HINTS
    if words(name) and float not in alternatives(name)
}
"""Options with a list of values."""

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(map(str, words(name))) for name in _HINTS if words(name) and float in alternatives(name)
}
"""Words that an option takes in place of a number."""


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
