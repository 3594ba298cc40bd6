"""What a compile gives: the quantized graph, and everything that is known about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from resq_compiler.analysis.topology import Topology
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.pipeline.provenance import Provenance
from resq_compiler.pipeline.stages import Stage
from resq_compiler.recipes.settings import CompileConfig


@dataclass(frozen=True, eq=False)
class CompileResult:
    """A quantized graph with what storage, backends, evaluation and inspection need to know of it.

    graph_module: (input_ids, attention_mask, position_ids, *past) -> (logits, *present), as capture.py says. options: as passes
    resolved them. cache_specs: the shape of every layer's cache. config, generation_config, tokenizer: those of the float model.
    stages: the graph after every pass (empty after loading). notes: what a user should know. topology: what was found in the float
    graph (None after loading). provenance: the float model and the calibration data. sample_ids: a window of the calibration
    data [1, length], or None. passes: their text form (recipes/text.py), as asked for; empty in what an older version saved.
    """

    graph_module: GraphModule
    options: CompileConfig
    cache_specs: tuple[CacheSpec, ...]
    config: PreTrainedConfig
    generation_config: GenerationConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    topology: Topology | None = None
    provenance: Provenance = Provenance()
    sample_ids: Tensor | None = None
    passes: str = ""

    @property
    def source(self) -> str:
        """The float model, in words."""
        return str(self.provenance.model)
