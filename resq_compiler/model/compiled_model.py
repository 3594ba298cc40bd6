"""CompiledModel: a quantized graph that behaves like the Hugging Face model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.pipeline.stages import Stage, copy_graph
from resq_compiler.recipes.settings import CompileConfig


class CompiledModel(PreTrainedModel, GenerationMixin):
    """A compiled decoder: `forward`, `generate`, `save_pretrained` as in transformers, and what the compiler did to it.

    config: the HF configuration. options: the CompileConfig. graph_module: the quantized graph. stages: the graph after every
    pass (empty after `load`). notes: what a user should know. tokenizer: the one the model came with, or None. sample_ids: a
    window of the calibration data [1, length], or None.

    The cache holds the float image of 4/8-bit codes: values are those of a packed cache, its memory is not (ONNX and Triton
    backends store the codes).
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _is_stateful = False

    def __init__(
        self, config: PreTrainedConfig, graph_module: GraphModule, options: CompileConfig, cache: Sequence[CacheSpec], *,
        generation_config: GenerationConfig | None = None, tokenizer: Any = None, stages: Sequence[Stage] = (),
        notes: Sequence[str] = (), topology: Any = None, source: str = "", sample_ids: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(config)
        self._graph_module: GraphModule | None = graph_module
        self.options = options
        self.cache_specs = tuple(cache)
        self.tokenizer = tokenizer
        self.stages = list(stages)
        self.notes = list(notes)
        self.topology = topology
        self.source = source
        self.sample_ids = sample_ids
        self.backend = "reference"
        self._runner: Any = None
        if generation_config is not None:
            self.generation_config = generation_config
        self.eval()

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property
    def graph_module(self) -> GraphModule:
        """The quantized graph. A backend that holds the weights in a form of its own makes it again for whoever asks."""
        return self._runner.quantized_graph() if self._graph_module is None else self._graph_module

    @property
    def runner(self) -> Any:
        """What computes: the quantized graph, or what a backend made of it (triton: a module with the lowered graph_module)."""
        return self._graph_module if self._runner is None else self._runner

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """float32: codes are integers, everything between them is float32."""
        return torch.float32

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is tied in a compiled graph."""

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, use_cache: bool | None = None, labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, return_dict: bool | None = None, **unused: Any,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """Logits [B, S, vocabulary] float32 for new tokens input_ids [B, S], as the original model's forward.

        attention_mask [B, P + S] (0 = padding), position_ids [B, S]; past_key_values: the cache a former call returned.
        Raises BackendError for inputs a compiled graph cannot take (inputs_embeds, attention outputs, other caches).
        """
        self._refuse(unused)
        cache, past = self._past(past_key_values, input_ids)
        length = past[0].shape[2] if past else 0
        batch, new = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, length + new)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, length:]  # padding takes no position
        logits, *present = self._execute(input_ids, attention_mask.long(), position_ids.expand(batch, new), past)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = logits[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else keep]
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        returned = self._filled(cache, present) if use_cache is not False else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=returned)
        return output if return_dict is not False else output.to_tuple()

    def _execute(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the graph on the chosen backend."""
        return self.runner(ids, mask, positions, *past)

    def use_backend(self, name: str, **options: Any) -> CompiledModel:
        """Compute with another backend from now on ("reference", "onnx", "triton"); returns the model itself.

        options: of the backend's constructor (triton: dtype, allow_fallback). A backend that packs the weights (triton) is their
        only holder then; its lowered graph joins `stages`, and so `dump`.
        Raises BackendError if there is no such backend or option, it cannot run here, or it cannot take the graph.
        """
        from resq_compiler.backends import load_backend

        graph = self.graph_module
        runner = load_backend(name, **options).prepare(self) if name != "reference" or options else None
        self._graph_module = None if hasattr(runner, "quantized_graph") else graph
        if self._graph_module is None:
            graph.graph.owning_module = None  # facts refer to nodes, which must not keep the weights alive
        del self._runner  # one that was a module, registered as such, may be followed by one that is none
        self._runner, self.backend = runner, name
        self._add_stages(graph, getattr(runner, "stages", []))
        return self

    def _add_stages(self, graph: GraphModule, lowered: Sequence[Stage]) -> None:
        """Put what a backend made of the graph behind the passes, in place of what another one did."""
        self.stages = [stage for stage in self.stages if not stage.name.startswith("lower-")]
        if lowered and not self.stages:
            self.stages = [Stage(0, "loaded", "", copy_graph(graph.graph), 0, 0.0, None)]
        self.stages += lowered

    def export_onnx(self, directory: str | Path, profile: str = "qdq", **options: Any) -> Path:
        """Write an ONNX directory that runs as it is: profile "qdq", "ort" or "weight-only"; see backends.onnx.export_onnx."""
        from resq_compiler.backends.onnx import export_onnx

        return export_onnx(self, directory, profile, **options)

    @staticmethod
    def _refuse(unused: dict[str, Any]) -> None:
        harmless = {
            "output_attentions",
            "output_hidden_states",
            "token_type_ids",
            "cache_position",
            "num_items_in_batch",
        }
        bad = [
            k
            for k, v in unused.items()
            if v is not None and v is not False and (k not in harmless or k.startswith("output_"))
        ]
        if bad:
            raise BackendError(
                f"forward: a compiled graph cannot take {', '.join(bad)}; it takes input_ids, attention_mask, position_ids, past_key_values"
            )

    def _past(self, cache: Cache | None, input_ids: Tensor) -> tuple[DynamicCache, list[Tensor]]:
        """Cache tensors in graph order. A fresh cache of another class is replaced by a plain DynamicCache: masks do windows."""
        filled = cache is not None and cache.get_seq_length() > 0
        if filled and not (
            isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        ):
            raise BackendError(
                f"past_key_values: expected the DynamicCache that forward returned, got a filled {type(cache).__name__}"
            )
        if not filled:
            plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
            cache = cache if plain else DynamicCache()
            batch = input_ids.shape[0]
            shapes = [(batch, s.num_heads, 0, w) for s in self.cache_specs for w in (s.key_dim, s.value_dim)]
            return cache, [torch.zeros(shape, device=input_ids.device) for shape in shapes]
        return cache, [t for layer in cache.layers for t in (layer.keys, layer.values)]

    @staticmethod
    def _filled(cache: DynamicCache, present: list[Tensor]) -> DynamicCache:
        while len(cache.layers) < len(present) // 2:
            cache.layers.append(DynamicLayer())
        for layer, key, value in zip(cache.layers, present[::2], present[1::2], strict=True):
            layer.keys, layer.values = key, value
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        return cache

    def save_pretrained(self, save_directory: str | Path, max_shard_size: str | int = "5GB", **unused: Any) -> None:
        """Write safetensors and JSON to a directory; see checkpoint.save."""
        from resq_compiler.storage import checkpoint

        _refuse_options("save_pretrained", unused, {"safe_serialization": True, "is_main_process": True})
        checkpoint.save(self, save_directory, max_shard_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device_map: Any = None, **unused: Any) -> CompiledModel:  # type: ignore[override]
        """Open a saved compiled model; see checkpoint.load. device_map: one device. Raises BackendError for other options."""
        from resq_compiler.storage import checkpoint

        harmless = {"dtype": (torch.float32, "float32", "auto"), "trust_remote_code": (True, False)}
        ignored = {"config", "revision", "adapter_kwargs", "low_cpu_mem_usage"}
        _refuse_options("from_pretrained", {k: v for k, v in unused.items() if k not in ignored}, harmless)
        if isinstance(device_map, dict):
            (device_map,) = set(device_map.values())
        return checkpoint.load(name, device=None if device_map == "auto" else device_map)

    def dump(self, directory: str | Path, tokens: Tensor | None = None) -> Path:
        """Write what every pass did: text, JSON and Graphviz of each stage, and index.html. See inspection/dump.py.

        Args:    directory: made if absent. tokens: ids [n, length] to measure the noise of every quantizer on (default:
                 a window of the calibration data, if the model was compiled with one).
        Returns: the directory.
        Raises:  DumpError: the directory cannot be written.
        """
        from resq_compiler.inspection.dump import dump_compiled

        return dump_compiled(self, directory, tokens)


def _refuse_options(where: str, options: dict[str, Any], harmless: dict[str, Any]) -> None:
    """Raise BackendError for an option that would be ignored."""
    for name, value in options.items():
        allowed = harmless.get(name, ())
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if value is not None and value is not False and value not in allowed:
            raise BackendError(f"{where}: option {name}={value!r} means nothing for a compiled model; leave it out")
