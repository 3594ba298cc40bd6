"""The passes, one file each. Each file says what it rewrites; `resq_compiler.recipes` says in which order they run."""

from resq_compiler.passes.allocate_bits import AllocateBits
from resq_compiler.passes.canonicalize import Canonicalize
from resq_compiler.passes.compute_bases import ComputeBases
from resq_compiler.passes.find_topology import FindTopology
from resq_compiler.passes.fold_norms import FoldNorms
from resq_compiler.passes.fuse_projections import FuseProjections
from resq_compiler.passes.insert_prefix import InsertPrefix
from resq_compiler.passes.insert_projections import InsertProjections
from resq_compiler.passes.name_attention import NameAttention
from resq_compiler.passes.partition_linears import PartitionLinears
from resq_compiler.passes.quantize_activations import QuantizeActivations
from resq_compiler.passes.quantize_kv_cache import QuantizeKvCache
from resq_compiler.passes.quantize_weights import QuantizeWeights
from resq_compiler.passes.reorder_channels import ReorderChannels
from resq_compiler.passes.split_fused import SplitFused
from resq_compiler.passes.untie_embeddings import UntieEmbeddings

__all__ = [
    "AllocateBits", "Canonicalize", "ComputeBases", "FindTopology", "FoldNorms", "FuseProjections", "InsertPrefix", "InsertProjections",
    "NameAttention", "PartitionLinears", "QuantizeActivations", "QuantizeKvCache", "QuantizeWeights", "ReorderChannels", "SplitFused",
    "UntieEmbeddings",
]  # fmt: skip
