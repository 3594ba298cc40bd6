"""From settings to passes, for all built-in recipes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from resq_compiler.passes import (
    AllocateBits,
    Canonicalize,
    ComputeBases,
    FindTopology,
    FoldNorms,
    FuseProjections,
    InsertPrefix,
    InsertProjections,
    KeepPredictions,
    LearnBlocks,
    LearnRotations,
    LearnScales,
    NameAttention,
    PartitionLinears,
    PlanColumns,
    QuantizeActivations,
    QuantizeKvCache,
    QuantizeWeights,
    ReorderChannels,
    RotateBases,
    SearchScales,
    SmoothChannels,
    SplitFused,
    SpreadOutliers,
    ThresholdOutliers,
    UntieEmbeddings,
)  # fmt: skip
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.settings import CompileConfig

ORDERS: dict[str, Literal["energy", "peak"]] = {"energy-split": "energy", "outliers": "peak"}
"""Values of `down_proj` that put the strongest channels last, and by what."""

SPLIT_DOWN = (*ORDERS, "block-pca")
"""Values of `down_proj` that give the input of down projections parts; the others quantize it whole, at the main bits."""

NAMING = (Canonicalize(), NameAttention(), SplitFused(), UntieEmbeddings(), FindTopology())

ROTATED = ("pca", "weights", "hadamard")
"""Values of `basis` that no gain of a norm lets pass. A permutation passes, and the gains stay with the values."""


def standard_passes(s: CompileConfig) -> tuple[Pass, ...]:
    """The whole pipeline, in order. Passes before insert-prefix and quantize-* are exact."""
    insert = s.basis != "none" or s.down_proj != "none"
    channels = ORDERS.get(s.down_proj)
    return (
        *NAMING,
        *([fold_norms(s)] if s.basis in ROTATED else []),
        *([SmoothChannels(s.smooth_alpha), FuseProjections("refused")] if s.smooth_alpha is not None else []),
        plan_columns(s),
        *([SearchScales(), FuseProjections("refused")] if s.scale_search else []),
        *([ThresholdOutliers(s.outlier_threshold)] if s.outlier_threshold is not None else []),
        *([compute_bases(s)] if s.basis != "none" or s.down_proj == "block-pca" else []),
        *([allocate_bits(s)] if s.allocates else []),
        *([RotateBases(s.rotation)] if s.basis in ("pca", "weights") and s.rotation != "none" else []),
        *([ReorderChannels(channels, *experts(s))] if channels else []),
        *([InsertProjections("none" if s.down_proj in ("none", "outliers") else "hadamard")] if insert else []),
        *([SpreadOutliers()] if s.spread_outliers else []),
        *([FuseProjections()] if insert or s.spread_outliers else []),
        PartitionLinears(),
        *([KeepPredictions()] if s.learn_rotations == "divergence" or s.learn_scales else []),
        *([InsertPrefix()] if s.prefix_tokens == "auto" else []),
        *quantizers(s),
    )


def fold_norms(s: CompileConfig) -> FoldNorms:
    """The share of high columns is that of all sites, none where the main bits reach their bits."""
    parts = min(s.weight_bits, s.activation_bits) < s.high_bits
    return FoldNorms(high_fraction=s.high_fraction if parts else 0.0)


def plan_columns(s: CompileConfig) -> PlanColumns:
    """Bits of every column."""
    return PlanColumns(
        weight_bits=s.weight_bits, activation_bits=s.activation_bits, kv_bits=s.kv_bits, high_bits=s.high_bits,
        high_fraction=s.high_fraction, low_bits=s.low_bits, low_fraction=s.low_fraction, sites=s.sites,
        rank_multiple=s.rank_multiple, split_down=s.down_proj in SPLIT_DOWN, lm_head_bits=s.lm_head_bits,
        weight_group_size=s.weight_group_size, experts=s.experts,
    )  # fmt: skip


def compute_bases(s: CompileConfig) -> ComputeBases:
    """Where the order of columns comes from. Without an order, a random rotation of the whole width."""
    down: Literal["block-pca", "none"] = "block-pca" if s.down_proj == "block-pca" else "none"
    random: Literal["orthogonal", "hadamard"] = "orthogonal" if s.rotation == "orthogonal" else "hadamard"
    return ComputeBases(
        random if s.basis == "hadamard" else s.basis, s.basis_weighting, s.key_basis, down, s.online_basis
    )


def experts(s: CompileConfig) -> tuple[int, bool, Literal["error", "layer"]]:
    """What passes that look at single experts ask of their tokens."""
    return s.expert_tokens, s.calibrate_all_experts, s.unreached_experts


def allocate_bits(s: CompileConfig) -> AllocateBits:
    """Where bits are shared out."""
    return AllocateBits(
        kind="widths" if s.allocation == "widths" else "sensitivity",
        average_bits=s.average_bits,
        megabytes=s.model_megabytes,
        channels=ORDERS.get(s.down_proj, "none"),
        prefix_tokens=InsertPrefix().most if s.prefix_tokens == "auto" else 0,
        all_experts=s.calibrate_all_experts,
    )


def quantizers(s: CompileConfig) -> tuple[Pass, ...]:
    """Weights, then activations and cache; the other way round where GPTQ is to see quantized activations."""
    method = s.weight_method if s.weight_bits < 16 else "rtn"  # of lm_head, which is all there is then
    weights = QuantizeWeights(
        method, s.weight_clip, s.gptq_damping, s.gptq_act_order, s.gptq_token_weighting, *experts(s), s.calibration_routing
    )  # fmt: skip
    narrow = s.activation_bits < 8 or s.low_fraction or s.site_fractions  # parts whose range may be clipped
    clip = s.activation_clip if narrow else 1.0
    activations = (
        QuantizeActivations(clip, s.o_proj_granularity, s.activation_scales, s.activation_group_size),
        QuantizeKvCache(s.kv_clip),
    )
    if s.weight_bits == 16 and s.lm_head_bits is None:
        return activations
    if not s.gptq_on_quantized_activations:
        return (weights, *activations)
    return (*activations, *learned_before(s), weights, *learned_behind(s))


def learned_before(s: CompileConfig) -> tuple[Pass, ...]:
    """What is learned while weights are float."""
    steps = s.learning_steps
    found: list[Pass] = []
    if s.learn_rotations != "none":
        text = s.learn_rotations == "cross-entropy"
        usual = LearnRotations(
            "cross-entropy" if text else "divergence",
            s.learn_pairs,
            "sgd" if text else "adam",
            steps,
            1.5 if text else 0.003,
        )
        found.append(usual if s.learning_rate is None else dataclasses.replace(usual, rate=s.learning_rate))
    if s.learn_blocks:
        blocks = LearnBlocks(steps=steps)
        found.append(blocks if s.learning_rate is None else dataclasses.replace(blocks, rate=s.learning_rate))
    return tuple(found)


def learned_behind(s: CompileConfig) -> tuple[Pass, ...]:
    """What is learned when weights are codes."""
    if not s.learn_scales:
        return ()
    usual = LearnScales(codes=s.learn_codes, steps=s.learning_steps)
    if s.learning_rate is None:
        return (usual,)
    return (dataclasses.replace(usual, rate=s.learning_rate, code_rate=usual.code_rate / usual.rate * s.learning_rate),)
