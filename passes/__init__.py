"""The passes, one file each. Each file says what it rewrites; `resq_compiler.recipes` says in which order they run."""

from resq_compiler.passes.allocate_bits import AllocateBits
from resq_compiler.passes.canonicalize import Canonicalize
from resq_compiler.passes.compute_bases import ComputeBases
from resq_compiler.passes.find_topology import FindTopology
from resq_compiler.passes.fold_norms import FoldNorms
from resq_compiler.passes.fuse_projections import FuseProjections
from resq_compiler.passes.insert_prefix import InsertPrefix
from resq_compiler.passes.insert_projections import InsertProjections
from resq_compiler.passes.keep_predictions import KeepPredictions
from resq_compiler.passes.learn_blocks import LearnBlocks
from resq_compiler.passes.learn_rotations import LearnRotations
from resq_compiler.passes.learn_scales import LearnScales
from resq_compiler.passes.name_attention import NameAttention
from resq_compiler.passes.partition_linears import PartitionLinears
from resq_compiler.passes.plan_columns import PlanColumns
from resq_compiler.passes.quantize_activations import QuantizeActivations
from resq_compiler.passes.quantize_kv_cache import QuantizeKvCache
from resq_compiler.passes.quantize_weights import QuantizeWeights
from resq_compiler.passes.reorder_channels import ReorderChannels
from resq_compiler.passes.rotate_bases import RotateBases
from resq_compiler.passes.search_scales import SearchScales
from resq_compiler.passes.smooth_channels import SmoothChannels
from resq_compiler.passes.split_fused import SplitFused
from resq_compiler.passes.spread_outliers import SpreadOutliers
from resq_compiler.passes.threshold_outliers import ThresholdOutliers
from resq_compiler.passes.untie_embeddings import UntieEmbeddings

from resq_compiler.pipeline.passes import Pass

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Canonicalize, NameAttention, SplitFused, UntieEmbeddings, FindTopology, FoldNorms, PlanColumns, ComputeBases, AllocateBits,
        RotateBases, ReorderChannels, InsertProjections, FuseProjections, PartitionLinears, InsertPrefix, QuantizeWeights,
        QuantizeActivations, QuantizeKvCache, SmoothChannels, SearchScales, ThresholdOutliers, SpreadOutliers,
        KeepPredictions, LearnRotations, LearnBlocks, LearnScales,
    )
}  # fmt: skip
"""By name, as the text form of a tuple of passes knows them. A pass of one's own is added here: PASSES[MyPass.name] = MyPass."""

__all__ = [
    "PASSES", "AllocateBits", "Canonicalize", "ComputeBases", "FindTopology", "FoldNorms", "FuseProjections", "InsertPrefix",
    "InsertProjections", "KeepPredictions", "LearnBlocks", "LearnRotations", "LearnScales",
    "NameAttention", "PartitionLinears", "PlanColumns", "QuantizeActivations", "QuantizeKvCache", "QuantizeWeights",
    "ReorderChannels", "RotateBases", "SearchScales", "SmoothChannels", "SplitFused", "SpreadOutliers", "ThresholdOutliers",
    "UntieEmbeddings",
]  # fmt: skip
