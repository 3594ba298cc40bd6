"""Turn a Hugging Face decoder into ONE FX graph that serves prefill and decode.

Inputs: input_ids [B, S] and attention_mask [B, P + S] int64, position_ids [B, S] int64, then past_key_i and past_value_i
[B, G, P, D] for each attention layer. Outputs: logits [B, S, vocabulary], then key_i and value_i with the new tokens appended.
Batch B, new tokens S and past length P are dynamic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from resq_compiler.errors import CaptureError
from resq_compiler.frontend.dynamic_rope import rope_of_positions
from resq_compiler.frontend.filled import join_filled
from resq_compiler.frontend.long_rope import forget_long_factors, long_factors_kept
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.promises import Promise, Promised
from resq_compiler.util import torch_state

EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST = 2, 5, 7  # none is 0 or 1: those sizes specialize a dynamic dimension
GROUPED_SDPA = "TRANSFORMERS_SDPA_FORCE_GQA"  # what transformers asks before it repeats keys and values for SDPA


@dataclass(frozen=True)
class CacheSpec:
    """Shape of one layer's cache entry: [B, num_heads, P, head_dim]; keys and values may differ in width."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass
class Captured:
    """A captured model: the graph, the shapes of its cache and float example inputs (left-padded, with a past).

    left_out: modules whose weights no token reaches, such as a vision tower, each with the number of its weights.
    """

    graph_module: GraphModule
    cache: tuple[CacheSpec, ...]
    example_inputs: tuple[Tensor, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


class _PlainCacheModel(nn.Module):
    """The model with its cache as plain tensors, and no cropping of sliding-window layers: the mask does that."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> Any:
        cache = DynamicCache()
        cache.layers = [_filled_layer(key, value) for key, value in past]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, [_entry(layer) for layer in cache.layers]


def _entry(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache layer; layers without attention have none."""
    return layer.keys, layer.values


def _filled_layer(key: Tensor, value: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values = key, value
    layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    return layer


def capture(model: PreTrainedModel) -> Captured:
    """Capture a model with torch.export.

    The graph refers to the model's own tensors (nothing is copied, and passes never write into them). Works on a model
    on the meta device. Raises CaptureError with the reason when the model cannot be exported.
    """
    was_training = model.training
    model.eval()
    try:
        with (
            exportable_attention(model), grouped_heads_kept(), rope_of_positions(model), long_factors_kept(model),
            torch_state.quiet_export(), torch.no_grad(),
        ):  # fmt: skip
            cache = _probe_cache(model)
            example = _example_arguments(model, cache)
            forget_long_factors(model)  # those that the probe made belong to its own mode
            with (
                unset_fake_temporarily()
            ):  # export has a mode of its own; constants of the model's code keep their values
                exported = torch.export.export(
                    _PlainCacheModel(model), example, dynamic_shapes=_dynamic(cache), strict=False
                )
                graph_module = _clean(exported.module(check_guards=False), len(cache))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"capture of {type(model).__name__}: torch.export could not make one graph with dynamic batch, sequence and past length: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; "
            f"{_reached(error)}a graph cannot have Python control flow over values (routing, early exit)"
        ) from error
    finally:
        model.train(was_training)
    return Captured(graph_module, cache, concrete_example(model.config.get_text_config().vocab_size, cache))


def _reached(error: BaseException) -> str:
    """Where in the model's own code the export ended."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
    last = frames[-1] if frames else None
    return "" if last is None else f"reached {last.name} in {Path(last.filename).name}, line {last.lineno}; "


def capture_promised(skeleton: PreTrainedModel, weights: Mapping[str, Promise]) -> Captured:
    """Capture a model without its weights; the graph holds promises of them, and the values of vectors and constants.

    skeleton: parameters on the meta device, buffers with values. Raises CaptureError, as `capture`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False) for p in skeleton.parameters()
        }
        memo |= {id(b): mode.from_tensor(b) for b in skeleton.buffers()}
        captured = capture(copy.deepcopy(skeleton, memo))
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    gm = captured.graph_module
    reached = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for target in sorted(reached):
        held = getattr(*graph_tools.owner_and_name(gm, target))
        if isinstance(held, Tensor):
            graph_tools.set_tensor(gm, target, _value_of(target, held, weights, buffers))
    vocabulary = skeleton.config.get_text_config().vocab_size
    left_out = dict(
        _left_out(skeleton, "", {id(p) for n, p in skeleton.named_parameters(remove_duplicate=False) if n in reached})
    )
    return dataclasses.replace(captured, example_inputs=concrete_example(vocabulary, captured.cache), left_out=left_out)


def _left_out(module: nn.Module, name: str, reached: set[int]) -> Iterator[tuple[str, int]]:
    """The outermost modules with weights of which none is reached, and the numbers of these."""
    weights = {id(p): p.numel() for p in module.parameters()}
    if weights and not weights.keys() & reached:
        yield name, sum(weights.values())
    elif weights:
        for part, child in module.named_children():
            yield from _left_out(child, f"{name}.{part}" if name else part, reached)


def _value_of(name: str, found: Tensor, weights: Mapping[str, Promise], buffers: Mapping[str, Tensor]) -> Tensor:
    """The promise of a weight, the value of a vector or constant."""
    if name in weights:
        promise = weights[name]
        return Promised(promise) if len(promise.shape) > 1 else promise.whole().clone()
    value = buffers.get(name, found)
    if isinstance(value, FakeTensor):
        raise CaptureError(
            f"capture: {name} {tuple(found.shape)} is neither a weight nor a buffer of the model, and has no value"
        )
    return value.clone()


@contextlib.contextmanager
def exportable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model computes attention by one operator of the graph (SDPA), or the eager form where a soft-cap rules SDPA out."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]  # each before those inside it
    before = [(config, config._attn_implementation) for config in configs]
    text = model.config.get_text_config()
    eager = getattr(text, "attn_logit_softcapping", None) is not None or not getattr(
        type(model), "_supports_sdpa", True
    )
    model.set_attn_implementation("eager" if eager else "sdpa")
    try:
        yield
    finally:
        for config, kind in before:
            config._attn_implementation = kind  # model.set_attn_implementation refuses what is not installed here


@contextlib.contextmanager
def grouped_heads_kept() -> Iterator[None]:
    """Inside, SDPA reads keys and values of grouped heads as they are: their repeats, of sizes that are symbols, took half of an export."""
    before = os.environ.get(GROUPED_SDPA)
    os.environ[GROUPED_SDPA] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[GROUPED_SDPA]
        else:
            os.environ[GROUPED_SDPA] = before


@contextlib.contextmanager
def runnable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model set to flash or flex attention, which want a GPU or a compiler, runs here as well."""
    if model.config._attn_implementation in (None, "eager", "sdpa"):
        yield
        return
    with exportable_attention(model):
        yield


@contextlib.contextmanager
def _experts_of_fakes(model: PreTrainedModel) -> Iterator[None]:
    """Inside, experts are computed by products that need no values: grouped ones of float32 refuse tensors without them."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [(config, config._experts_implementation) for config in configs]
    try:
        for config, kind in before:
            config._experts_implementation = "batched_mm" if kind == "grouped_mm" else kind
        yield
    finally:
        for config, kind in before:
            config._experts_implementation = kind


def _probe_cache(model: PreTrainedModel) -> tuple[CacheSpec, ...]:
    """Cache shapes, read from what the model itself writes for one token."""
    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    mask = (
        None if ids.is_meta else torch.ones_like(ids)
    )  # transformers looks into a mask, and a meta tensor has no values
    expected = "expected a decoder with attention in every layer (state-space, linear-attention and recurrent layers are not supported)"
    try:
        with _experts_of_fakes(model):
            model(input_ids=ids, attention_mask=mask, position_ids=ids, past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"capture of {type(model).__name__}: it does not run with a plain DynamicCache: {type(error).__name__}: {error}; {expected}"
        ) from error
    if not cache.layers or any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise CaptureError(f"capture of {type(model).__name__}: it wrote no keys and values into its cache; {expected}")
    entries = map(_entry, cache.layers)
    return tuple(CacheSpec(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in entries)


def _example_arguments(model: PreTrainedModel, cache: tuple[CacheSpec, ...]) -> tuple[Any, ...]:
    ids, mask, positions, *flat = concrete_example(model.config.get_text_config().vocab_size, cache, model.dtype)
    move = [t.to(model.device) for t in flat]
    past = list(zip(move[::2], move[1::2], strict=True))
    return ids.to(model.device), mask.to(model.device), positions.to(model.device), past


def concrete_example(
    vocab_size: int, cache: tuple[CacheSpec, ...], dtype: torch.dtype = torch.float32,
    batch: int = EXAMPLE_BATCH, new: int = EXAMPLE_NEW, past: int = EXAMPLE_PAST,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Deterministic inputs in graph order; the first row is left-padded by two positions when there is a past."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (batch, new), generator=generator)
    mask = torch.ones(batch, past + new, dtype=torch.long)
    mask[0, : min(2, past)] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, past:].contiguous()
    entries = []
    for spec in cache:
        for width in (spec.key_dim, spec.value_dim):
            entries.append(torch.randn(batch, spec.num_heads, past, width, generator=generator).to(dtype))
    return ids, mask, positions, *entries


def _dynamic(cache: tuple[CacheSpec, ...]) -> tuple[Any, ...]:
    tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    entry = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return tokens, tokens, tokens, [(entry, entry) for _ in cache]


def _clean(traced: GraphModule, layers: int) -> GraphModule:
    """Plain positional inputs with stable names, tensors under the model's own names, no export wrapper."""
    graph = traced.graph
    graph.set_codegen(CodeGen())
    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_{kind}_{i}" for i in range(layers) for kind in ("key", "value")]
    for node, name in zip(graph_tools.placeholders(graph), names, strict=True):
        node.target = name
        node._rename(name)
    tensors: dict[str, Any] = {}
    copies: dict[int, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = graph_tools.get_tensor(traced, node)
        node.target = str(node.target).removeprefix("model.")
        node._rename(node.target.replace(".", "_"))
        tensors[node.target] = _off_the_gpu(value, copies) if isinstance(value, Tensor) else value
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # checks devices of the time of export; shapes are checked by verify
    _read_what_is_written(graph)
    _sizes_of_first_inputs(graph)
    join_filled(graph)
    for node in graph.nodes:
        node.kwargs = {k: _real_device(v) for k, v in node.kwargs.items()}
        node.args = tuple(_real_device(a) for a in node.args)
    outputs = graph_tools.output_args(graph)
    graph.output_node().args = (tuple(outputs),)
    graph.owning_module = None
    captured = GraphModule(tensors, graph, class_name="CapturedModel")
    captured.graph.eliminate_dead_code()
    captured.recompile()
    return captured


def _sizes_of_first_inputs(graph: Graph) -> None:
    """Read every size off the first input that has it: torch.export takes the last, the cache of the last block, which whoever runs
    block by block knows last."""
    inputs = graph_tools.placeholders(graph)
    shapes = [(node, dim, str(size)) for node in inputs for dim, size in enumerate(values.shape(node))]
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        of, dim = node.args
        if of in inputs:
            size = str(values.shape(of)[dim])
            node.args = next((other, place) for other, place, same in shapes if same == size)


def _off_the_gpu(value: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """The tensor itself, or its copy in the CPU's memory where it lies on a GPU; one copy of what several nodes refer to."""
    if not value.is_cuda:
        return value.detach()
    return copies.setdefault(id(value), value.detach().cpu())


def _read_what_is_written(graph: Graph) -> None:
    """copy_(buffer, value), then reads of the buffer -> reads of the value: a graph keeps nothing from one call to the next.

    Long-context rotary embeddings write the frequencies they choose, short or long, into a buffer and read it again.
    Raises CaptureError: the buffer is read before it is written, so what is computed depends on the calls before.
    """
    written = {buffer for node in graph.nodes if (buffer := _written_buffer(node)) is not None}
    now: dict[str, Node] = {}
    for node in list(graph.nodes):
        buffer = _written_buffer(node)
        if buffer is not None:
            now[buffer] = node.all_input_nodes[1]
            graph_tools.replace(node, now[buffer])
            continue
        for read in [n for n in node.all_input_nodes if n.op == "get_attr" and n.target in written]:
            name = str(read.target)
            if name not in now:
                raise CaptureError(
                    f"capture: node {node.name} reads the buffer {name} before it is written, so the model keeps state beside "
                    "its cache; expected a decoder whose outputs depend on its inputs and its cache alone", node=node.name
                )  # fmt: skip
            node.replace_input_with(read, now[name])


def _written_buffer(node: Node) -> str | None:
    """The buffer that copy_(buffer, value), of one shape and type, overwrites."""
    inputs = node.all_input_nodes
    if not graph_tools.is_call(node, torch.ops.aten.copy_.default) or len(inputs) != 2 or inputs[0].op != "get_attr":
        return None
    before, after = map(values.tensor_value, inputs)
    return str(inputs[0].target) if before.shape == after.shape and before.dtype == after.dtype else None


def _real_device(value: Any) -> Any:
    """Masks and positions are computed on the CPU, wherever the model lay when it was captured."""
    return torch.device("cpu") if isinstance(value, torch.device) else value
