"""CompiledModel: a compile's result that behaves like the Hugging Face model it came from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from resq_compiler.backends.onnx import export_onnx
from resq_compiler.errors import BackendError
from resq_compiler.frontend.long_rope import short_length
from resq_compiler.frontend.positions import longest_row_of_graph, longest_text_of_graph
from resq_compiler.inspection.dump import dump_result
from resq_compiler.ir import graph_tools
from resq_compiler.model import cache as cache_tensors
from resq_compiler.model import inputs
from resq_compiler.model.execution import Execution
from resq_compiler.model.inputs import checked_prompt
from resq_compiler.model.masks import checked_mask, windows_of
from resq_compiler.pipeline.stages import Stage
from resq_compiler.result import CompileResult
from resq_compiler.storage.portable import from_portable, portable
from resq_compiler.storage.reading import read
from resq_compiler.storage.saving import save
from resq_compiler.util import devices

DOWNLOAD = ("revision", "cache_dir", "local_files_only", "force_download", "token")
FROM_AUTO_CLASSES = (
    "config",
    "adapter_kwargs",
    "quantization_config",
    "low_cpu_mem_usage",
    *DOWNLOAD,
)  # passed on unasked


class CompiledModel(PreTrainedModel, GenerationMixin):
    """A compiled decoder: `forward`, `generate`, `save_pretrained` as in transformers, and what the compiler did to it.

    config: the HF configuration. options: the CompileConfig. graph_module: the quantized graph. stages: the graph after every
    pass (empty after `load`). notes: what a user should know. tokenizer: the one the model came with, or None. sample_ids: a
    window of the calibration data [1, length], or None. provenance: the float model and the calibration data. result: all of it
    as a CompileResult. longest_text: tokens, where a table of positions ends; else None.

    The cache holds the float image of 4/8-bit codes: values are those of a packed cache, its memory is not (ONNX and Triton
    backends store the codes).
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _is_stateful = False

    def __init__(self, result: CompileResult):
        super().__init__(result.config)
        self.execution = Execution(result.graph_module)
        self.generation_config = result.generation_config
        self.options = result.options
        self.cache_specs = result.cache_specs
        self.tokenizer = result.tokenizer
        self.stages = list(result.stages)
        self.notes = list(result.notes)
        self.topology = result.topology
        self.provenance = result.provenance
        self.sample_ids = result.sample_ids
        self.passes = result.passes
        self._short_length = short_length(result.config.get_text_config().to_dict())
        self.longest_text = longest_text_of_graph(result.graph_module.graph, result.config)
        self._longest_row = longest_row_of_graph(result.graph_module.graph, result.config)
        self._windows = windows_of(result.graph_module.graph, result.config)
        self.eval()

    @property
    def result(self) -> CompileResult:
        """What was compiled, as everything below the Hugging Face face takes it."""
        return CompileResult(
            self.graph_module, self.options, self.cache_specs, self.config, self.generation_config, self.tokenizer,
            tuple(self.stages), tuple(self.notes), self.topology, self.provenance, self.sample_ids, self.passes,
        )  # fmt: skip

    @property
    def source(self) -> str:
        """The float model it was compiled from, in words."""
        return str(self.provenance.model)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property
    def graph_module(self) -> GraphModule:
        """The quantized graph."""
        return self.execution.graph_module

    @property
    def runner(self) -> Any:
        """What computes: the quantized graph, or what a backend made of it (triton: a module with the lowered graph_module)."""
        return self.execution.runner

    @property
    def backend(self) -> str:
        """The name of what computes."""
        return self.execution.backend

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """float32: codes are integers, everything between them is float32."""
        return torch.float32

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch. A model that was opened has its codes in memory from here on."""
        self.execution.settle()
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """Behind `.to`, `.half` and their like: other devices, but no other dtype. Raises BackendError before anything changes."""
        dtype = fn(torch.zeros(0, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise BackendError(
                f"a compiled model cannot be made {dtype}: codes are integers and what lies between them is float32; leave the dtype "
                "out (.to(device) moves it), or use_backend('triton', dtype=...)"
            )
        moved: CompiledModel = super()._apply(fn, recurse)
        self.execution.move_constructors(self.device)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A model with tensors of its own, on the same backend; what describes the compile is shared."""
        result = self.result
        graph_module = graph_tools.snapshot(result.graph_module)
        for name, value in result.graph_module.named_buffers():
            graph_tools.set_tensor(graph_module, name, value.clone())
        config, generation = copy.deepcopy((result.config, result.generation_config), memo)
        again = CompiledModel(
            dataclasses.replace(result, graph_module=graph_module, config=config, generation_config=generation)
        )
        return again.use_backend(self.backend, **self.execution.options)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and torch.save: what `save_pretrained` keeps, so without stages; it comes back on the same backend."""
        return _unpickled, (portable(self.result), self.backend, self.execution.options)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is tied in a compiled graph."""

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, use_cache: bool | None = None, labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, return_dict: bool | None = None, **unused: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """Logits [B, S, vocabulary] float32 for new tokens input_ids [B, S], as the original model's forward.

        attention_mask [B, P + S] (0 = padding), position_ids [B, S]; past_key_values: the cache a former call returned.
        Raises BackendError for inputs a compiled graph cannot take (inputs_embeds, attention outputs, other caches).
        """
        _refuse_inputs(unused)
        ids = inputs.checked_ids(input_ids, self.config.get_text_config().vocab_size)
        logits_to_keep = inputs.checked_kept(logits_to_keep, ids.shape[1])
        caches = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        alone = attention_mask is None and past_key_values is None and not caches
        texts = inputs.packed_texts(ids, position_ids) if alone and position_ids is not None else None
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if texts is None:
            logits, cache = self._continued(ids, attention_mask, position_ids, past_key_values, last)
        else:
            logits, cache = self._apart(texts), None
        logits = logits[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-last, None)]
        labels = None if labels is None else inputs.checked_labels(labels, logits)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache is not False else None
        )
        return output if return_dict is not False else output.to_tuple()

    def _continued(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None, last: int
    ) -> tuple[Tensor, Cache]:  # fmt: skip
        """Logits of the last of the new tokens (0: of all), and the cache with them."""
        cache, past = cache_tensors.opened(past_key_values, self.cache_specs, ids)
        length = past[0].shape[2] if past else 0
        mask = checked_mask(attention_mask, ids, length, self._windows)
        positions = inputs.checked_positions(position_ids, mask, ids.shape[1], self.longest_text, self._longest_row)
        logits, *present = self.execution(ids, mask, positions, *past, logits_to_keep=last)
        return logits, cache_tensors.filled(cache, present)

    def _apart(self, texts: inputs.PackedTexts) -> Tensor:
        """Logits of texts that are packed into rows: none sees another, as in transformers."""
        past = cache_tensors.empty(self.cache_specs, texts.ids)
        logits: Tensor = self.execution(texts.ids, texts.mask, texts.positions, *past)[0]
        return logits[texts.row, texts.column]

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises BackendError for a prompt or a mask that is none."""
        given = kwargs.pop("input_ids", None) if inputs is None else inputs
        prompt = checked_prompt(given, kwargs, self.config.get_text_config().vocab_size)
        transformers: Any = super()
        return transformers.generate(prompt, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor | None:
        """The mask [B, P + S] as it is: transformers makes one of four dimensions for static caches, and a graph makes its own."""
        return attention_mask

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, next_sequence_length: int | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:  # fmt: skip
        """As in transformers; a text that outgrows the short factors of a LongRoPE model begins a new cache."""
        limit = self._short_length
        if limit is not None and past_key_values and past_key_values.get_seq_length() <= limit < input_ids.shape[1]:
            past_key_values = next_sequence_length = None
        transformers: Any = super()
        prepared: dict[str, Any] = transformers.prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, **kwargs
        )
        return prepared

    def use_backend(self, name: str, **options: Any) -> CompiledModel:
        """Compute with another backend from now on ("reference", "onnx", "cpu", "triton"); returns the model itself.

        "auto" takes the best that runs here and takes the graph: triton for a model on a GPU, else cpu, else reference; `backend`
        then says which. options: of the backend's constructor (triton: dtype, allow_fallback; cpu: engine, allow_fallback).
        A backend that packs the weights (triton, cpu) is their only holder then; its lowered graph joins `stages`, and so `dump`.
        Raises BackendError if there is no such backend or option, it cannot run here, or it cannot take the graph.
        """
        result = self.result
        lowered = self.execution.switch(result, name, options)
        passes = [stage for stage in self.stages if not stage.name.startswith("lower-")]
        if lowered and not passes:
            passes = [Stage(0, "loaded", "", graph_tools.copy_graph(result.graph_module.graph), 0, 0.0, None)]
        self.stages = [*passes, *lowered]
        return self

    def export_onnx(self, directory: str | Path, profile: str = "qdq", **options: Any) -> Path:
        """Write an ONNX directory that runs as it is: profile "qdq", "ort", "weight-only" or "native"; see backends.onnx.export_onnx."""
        return export_onnx(self.result, directory, profile, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, max_shard_size: str | int = "5GB", **unused: Any
    ) -> None:
        """Write safetensors and JSON to a directory; see storage/saving.py."""
        _refuse_options("save_pretrained", unused, {"safe_serialization": True, "is_main_process": True})
        save(self.result, save_directory, max_shard_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device_map: Any = None, **options: Any) -> CompiledModel:  # type: ignore[override]
        """Open a saved compiled model; see storage/reading.py.

        device_map: one device; "auto": a GPU where there is one. options: of the download of a hub id (revision, cache_dir,
        local_files_only, force_download, token).
        Raises BackendError for options that would change nothing, such as another dtype.
        """
        download = {key: options.pop(key) for key in DOWNLOAD if options.get(key) is not None}
        dtypes = (torch.float32, "float32", "auto")
        harmless = {"dtype": dtypes, "torch_dtype": dtypes, "trust_remote_code": (True, False), "subfolder": ""}
        _refuse_options("from_pretrained", {k: v for k, v in options.items() if k not in FROM_AUTO_CLASSES}, harmless)
        if isinstance(device_map, dict):
            (device_map,) = set(device_map.values())
        model: Any = cls(read(name, **download))
        return model if device_map is None else model.to(devices.resolve(device_map))

    def dump(self, directory: str | Path, tokens: Tensor | None = None) -> Path:
        """Write what every pass did: text, JSON and Graphviz of each stage, and index.html. See inspection/dump.py.

        Args:    directory: made if absent. tokens: ids [n, length] to measure the noise of every quantizer on (default:
                 a window of the calibration data, if the model was compiled with one).
        Returns: the directory.
        Raises:  DumpError: the directory cannot be written.
        """
        return dump_result(self.result, directory, tokens)


def _unpickled(contents: dict[str, Any], backend: str, options: dict[str, Any]) -> CompiledModel:
    return CompiledModel(from_portable(contents)).use_backend(backend, **options)


def _refuse_inputs(given: Mapping[str, Any]) -> None:
    """Raise BackendError for inputs of forward that would change nothing."""
    harmless = {"token_type_ids", "cache_position", "num_items_in_batch"}
    bad = [name for name, value in given.items() if value is not None and value is not False and name not in harmless]
    if bad:
        raise BackendError(
            f"forward: a compiled graph cannot take {', '.join(bad)}; it takes input_ids, attention_mask, position_ids, past_key_values"
        )


def _refuse_options(where: str, options: Mapping[str, Any], harmless: Mapping[str, Any]) -> None:
    """Raise BackendError for an option that would be ignored."""
    for name, value in options.items():
        allowed = harmless.get(name, ())
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if value is not None and value is not False and value not in allowed:
            raise BackendError(f"{where}: option {name}={value!r} means nothing for a compiled model; leave it out")
