"""Profile `native`: the graph lowered to fused operators, as nodes of the domain `resq` that the CPU kernels' library computes.

What each node takes and gives is written in kernels/src/onnx_linears.c and onnx_attention.c: a quantizer that one linear reads is one
node with it, and attention with the rotation and the cache before it. Weights are stored as the kernels read
them; the cache is uint8 [B, G, P, bytes of a packed row], one tensor for keys and one for values of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.cpu import library
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import LOW_BITS, HeadParts, head_parts
from resq_compiler.backends.fused.kernels import ACTIVATIONS, EXPERT_ACTIVATIONS, NORMS
from resq_compiler.backends.fused.lower import Lowered, check_taken, lower
from resq_compiler.backends.fused.targets import find_target
from resq_compiler.backends.onnx.chain import DOMAIN, chained
from resq_compiler.backends.onnx.emit_ops import hadamard_of
from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.kept_logits import emit_kept, head_of, head_reader
from resq_compiler.backends.onnx.lowering import Lowering, LoweringOptions
from resq_compiler.backends.onnx.registry import check_supported, emits
from resq_compiler.backends.onnx.small_nodes import joined
from resq_compiler.backends.onnx.tied_embedding import FROM_HEAD, embeds_tokens, rows_of_head
from resq_compiler.backends.onnx.values import Pieces, Value
from torch.fx import GraphModule, Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import int_arg
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import AppendCache, CodedLinear, Columns, Quantize, QuantizeDequantize
from resq_compiler.numerics.hadamard import hadamard_plan
from resq_compiler.numerics.hadamard_orders import is_power_of_two

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.builder import GraphBuilder


def kernels_library() -> Path:
    """The installed library of CPU kernels. Raises BackendError: there is none, or it cannot be used."""
    return library.library().path


def row_bytes(parts: HeadParts) -> int:
    """Bytes of one token of a cached head."""
    return CachedHead(*parts.attribute).row_bytes


def lower_native(gm: GraphModule, later: bool = False) -> Lowered:
    """A copy of a quantized graph on fused operators; experts, which no kernel groups, stay for standard operators.

    later: packed weights are promises, made when somebody asks for them.
    Raises BackendError that names every node none takes, with the reason.
    """
    target = find_target("cpu")
    lowered = lower(graph_tools.snapshot(gm), target, allow_fallback=True, later=later)
    experts = {node.name for node in lowered.graph_module.graph.nodes if is_of_experts(node)}
    check_taken(target, {name: reason for name, reason in lowered.reasons.items() if name not in experts})
    check_supported(lowered.graph_module)
    return lowered


def is_of_experts(node: Node) -> bool:
    """A linear of experts on codes, or a quantizer that such linears alone read."""
    if Quantize.of(node) is not None:
        return all(is_of_experts(user) for user in node.users)
    linear = CodedLinear.of(node)
    return linear is not None and linear.of_experts


def cache_rows(gm: GraphModule) -> list[int]:
    """Bytes of a packed row of each cache entry of a quantized graph, keys and values of every layer in order."""
    entries = (AppendCache.require(n) for n in gm.graph.find_nodes(op="call_function", target=ops.append_cache))
    return [row_bytes(head_parts(QuantizeDequantize.require(entry.new).parts)) for entry in entries]


@dataclass(frozen=True)
class FusedCall:
    """A quantizer: `kind`Quantize makes codes, `kind`Linear multiplies them as well.

    inputs: all that the operator has, "" absent.    outputs: behind the linear's own.
    """

    kind: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    outputs: tuple[str, ...] = ()


def only_linear(quantizer: Node) -> Node | None:
    """The linear that alone reads the codes of a quantizer."""
    readers = {user for piece in quantizer.users for user in piece.users}
    (reader,) = readers if len(readers) == 1 else (None,)
    return reader if reader is not None and reader.target is operators.mixed_linear else None


class NativeLowering(Lowering):
    """Emits a lowered graph: fused operators as they are, the rest in standard operators."""

    def __init__(self, lowered: Lowered, options: LoweringOptions):
        self.lowered = lowered
        self.quantizers: dict[Node, FusedCall] = {}
        self.rotations: dict[Node, FusedCall] = {}
        super().__init__(lowered.graph_module, (), IntegerForm(), options)
        self.head = head_reader(graph_tools.output_args(lowered.graph_module.graph)[0])

    def run(self) -> GraphBuilder:
        self.b.domains[DOMAIN] = 1
        builder = super().run()
        builder.nodes = joined(builder)
        builder.nodes, builder.types = chained(builder.needed()[0], (output.name for output in builder.outputs))
        return builder

    def emit(self, node: Node) -> None:
        """As ever; what lm_head is about are the positions that are kept, and its rows may be the embedding."""
        if self.options.embedding == FROM_HEAD and embeds_tokens(node, graph_tools.placeholders(self.gm.graph)[0]):
            (logits,) = graph_tools.output_args(self.gm.graph)
            self.env[node] = Value(rows_of_head(self, node, head_of(logits)))
            return
        if self.head is None or node is not self.head[0]:
            super().emit(node)
            return
        x = self.head[1]
        whole, self.env[x] = self.value(x), Value(emit_kept(self, self.exact(x)))
        super().emit(node)
        self.env[x] = whole

    def _inputs(self) -> None:
        ids, mask, positions, _, *caches = graph_tools.placeholders(self.gm.graph)
        for node, name, length in (
            (ids, "input_ids", "sequence"), (mask, "attention_mask", "total"), (positions, "position_ids", "sequence"),
        ):  # fmt: skip
            self.env[node] = Value(self.b.input(name, TensorProto.INT64, ("batch", length)))
        for i, node in enumerate(caches):
            self.env[node] = Value(self._cache(i, "past_key_values", "past", self.b.input))

    def _outputs(self) -> None:
        (result,) = graph_tools.output_args(self.gm.graph)
        logits = self.exact(result)
        self.b.scope("")
        self.b.op("Identity", logits, output="logits")
        positions = "sequence" if self.head is None else 1
        self.b.output("logits", TensorProto.FLOAT, ("batch", positions, values.width(result)))
        for i in range(len(self.lowered.heads)):
            self._cache(i, "present", "total", self.b.output)

    def _cache(self, index: int, prefix: str, length: str, declare: Any) -> str:
        """Declare the tensor of one cache entry; returns its name."""
        parts = self.lowered.caches[index // 2]
        assert parts is not None  # lower() refuses a float cache
        name = f"{prefix}.{index // 2}.{('key', 'value')[index % 2]}"
        shape = ("batch", self.lowered.heads[index][0], length, row_bytes(parts[index % 2]))
        declare(name, TensorProto.UINT8, shape)
        return name

    def optional(self, node: Node | None) -> str:
        """An operand that may be absent."""
        return "" if node is None else self.exact(node)

    def tiles(self, node: Node) -> str:
        """Weight codes as the operator takes them, uint8."""
        shape = graph_tools.held(self.gm, node).shape
        return self.b.later(str(node.target), shape, np.uint8, lambda: map(as_bytes, self.pieces(node)))

    def fused(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> list[str]:
        """A node of the domain."""
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        return self.b.several(kind, *inputs, outputs=outputs, domain=DOMAIN, **attributes)

    def codes(self, node: Node, call: FusedCall) -> Pieces:
        """A node that quantizes: low, high, scale and zero point. Where one linear alone reads them, that one makes them itself."""
        if only_linear(node) is not None:
            self.quantizers[node] = call
            return Pieces(("",) * 4)
        return self.codes_apart(call)

    def codes_apart(self, call: FusedCall) -> Pieces:
        """The four results of an operator that quantizes, and does nothing more."""
        names = [self.b.fresh(name) for name in ("low", "high", "scale", "zero_point")]
        return Pieces(tuple(self.fused(f"{call.kind}Quantize", call.inputs, names, **call.attributes)))


def as_bytes(codes: np.ndarray) -> np.ndarray:
    """The same memory as uint8."""
    return codes.view(np.uint8)


def _native(low: Lowering) -> NativeLowering:
    assert isinstance(low, NativeLowering)  # no other graph has fused operators
    return low


def _arguments(node: Node) -> tuple[Any, ...]:
    """Arguments of a fused operator, as its schema orders them: lowering gives all by position."""
    return cast("tuple[Any, ...]", node.args)


def _parts(
    bits: Sequence[int],
    weight_bits: Sequence[int],
    widths: Sequence[int],
    clips: Sequence[float] = (),
    groups: Sequence[int] = (),
) -> dict[str, Any]:
    """Attributes of the parts of a row."""
    found: dict[str, Any] = {}
    for i, (b, side) in enumerate(zip(bits, _sides(weight_bits), strict=True)):
        found |= {f"{side}_bits": b, f"{side}_width": widths[i]}
        found |= {f"{side}_groups": groups[i]} if groups else {}
        found |= {f"{side}_clip": clips[i]} if clips else {}
    return found


def _sides(weight_bits: Sequence[int]) -> list[str]:
    return ["low" if bits <= LOW_BITS else "high" for bits in weight_bits]


def _heads(key_parts: Sequence[int], value_parts: Sequence[int]) -> dict[str, int]:
    """Attributes of a cached head."""
    names = ("low_width", "high_width", "low_bits", "high_bits")
    keys = dict(zip(names, key_parts, strict=True))
    return keys | {f"value_{name}": number for name, number in zip(names, value_parts, strict=True)}


@emits(operators.norm_quantize)
def norm_quantize(low: Lowering, node: Node) -> Pieces:
    x, weight, bias, norm, eps, bits, weight_bits, widths, groups, clips, _ = _arguments(node)
    native = _native(low)
    inputs = (native.exact(x), native.optional(weight), native.optional(bias))
    attributes = dict(norm=NORMS.index(norm), epsilon=eps, **_parts(bits, weight_bits, widths, clips, groups))
    return native.codes(node, FusedCall("Norm", inputs, attributes))


@emits(operators.mixed_linear)
def mixed_linear(low: Lowering, node: Node) -> Value:
    native, (codes, rest) = _native(low), (_arguments(node)[:4], _arguments(node)[4:])
    weight_low, weight_high, scale, row_sum, bias, residual, bits, weight_bits, widths, groups, _, _ = rest
    weights = [native.tiles(weight_low), native.tiles(weight_high), native.exact(scale), native.exact(row_sum)]
    weights += [native.optional(bias), native.optional(residual)]
    output = [native.b.fresh("y")]
    call = native.quantizers.get(codes[0].all_input_nodes[0])
    if call is not None:
        outputs = [*output, *call.outputs]
        return Value(native.fused(f"{call.kind}Linear", [*call.inputs, *weights], outputs, **call.attributes)[0])
    inputs = [*(native.exact(x) for x in codes), *weights]
    return Value(native.fused("MixedLinear", inputs, output, **_parts(bits, weight_bits, widths, (), groups))[0])


@emits(operators.hadamard_quantize)
def hadamard_quantize(low: Lowering, node: Node) -> Pieces:
    gate, up, activation, transpose, bits, weight_bits, widths, groups, clips, _ = _arguments(node)
    native = _native(low)
    attributes, dense = _transforms(
        weight_bits,
        [width * count for width, count in zip(widths, groups, strict=True)],
        "transposed" if transpose else "hadamard",
    )
    together = None if up is None else _tiled([gate, up])
    products = (native.exact(gate), native.optional(up)) if together is None else (native.exact(together), "")
    inputs = (*products, native.b.constant(dense) if dense.size else "")
    attributes |= _parts(bits, weight_bits, widths, clips, groups)
    attributes |= {"activation": ACTIVATIONS.index(activation), "stacked": int(together is not None)}
    return native.codes(node, FusedCall("Hadamard", inputs, attributes))


@emits(operators.experts)
def experts(low: Lowering, node: Node) -> Value:
    """One node for all of a mixture but its router; [B, S, N]."""
    native, given = _native(low), _arguments(node)
    codes, routing, gate_up, down = given[:4], given[4:6], given[6:11], given[11:16]
    activation, gated, limit, slope, transform, *lists = given[16:28]
    bits, weight_bits, widths, hidden_bits, hidden_weight_bits, hidden_widths, hidden_clips = lists
    attributes, dense = _transforms(hidden_weight_bits, hidden_widths, transform)
    hidden = _parts(hidden_bits, hidden_weight_bits, hidden_widths, hidden_clips)
    attributes |= _parts(bits, weight_bits, widths) | {f"hidden_{name}": value for name, value in hidden.items()}
    attributes |= dict(activation=EXPERT_ACTIVATIONS.index(activation), gated=int(gated), limit=limit, slope=slope)
    inputs = [native.exact(x) for x in (*codes, *routing)]
    for weights in (gate_up, down):
        inputs += [native.tiles(weights[0]), *map(native.exact, weights[1:4]), native.optional(weights[4])]
    inputs.append(native.b.constant(dense) if dense.size else "")
    return Value(native.fused("Experts", inputs, [native.b.fresh("y")], **attributes)[0])


def _transforms(weight_bits: Sequence[int], widths: Sequence[int], transform: str) -> tuple[dict[str, Any], np.ndarray]:
    """Attributes of the transform of each part, and the matrices of orders that are not powers of two."""
    attributes: dict[str, Any] = {}
    dense = [np.zeros(0, np.float32)]
    for side, width in zip(_sides(weight_bits), widths, strict=True):
        if transform == "none":
            attributes[f"{side}_blocks"] = width
            continue
        plan = hadamard_plan(width)
        attributes |= {f"{side}_order{i}": order for i, order in enumerate(plan.orders)}
        attributes[f"{side}_blocks"] = plan.blocks
        for factor, order in zip(plan.factors, plan.orders, strict=True):
            if not is_power_of_two(order):
                matrix = factor.T if transform == "transposed" else factor
                dense.append(matrix.float().contiguous().flatten().numpy())
    return attributes, np.concatenate(dense)


def _tiled(pieces: Sequence[Node]) -> Node | None:
    """The tensor whose columns the pieces are, all of them and in this order; None if there is none."""
    found = [Columns.of(piece) for piece in pieces]
    columns = [one for one in found if one is not None]
    edges = [0, *(one.stop for one in columns)]
    if len(columns) < len(found) or len({one.x for one in columns}) != 1:
        return None
    whole = [one.start for one in columns] == edges[:-1] and edges[-1] == values.width(columns[0].x)
    return columns[0].x if whole else None


@emits(operators.hadamard)
def hadamard(low: Lowering, node: Node) -> Value:
    """A transform that no kernel takes, in standard operators."""
    x, transpose, sizes = _arguments(node)
    return hadamard_of(low, x, transpose, sizes)


@emits(operators.rope_cache)
def rope_cache(low: Lowering, node: Node) -> Value:
    q, k, v, cos, sin, u, keys, past_values, _, _, q_norm, k_norm, eps, clip, key_parts, value_parts, _ = _arguments(
        node
    )
    native, together = _native(low), _tiled([q, k, v])
    qkv = native.b.join([native.exact(x) for x in (q, k, v)]) if together is None else native.exact(together)
    pasts = [native.exact(keys), native.exact(past_values)]
    (reader,) = {user for user in node.users if user.target in (operators.attention, operators.attention_quantize)}
    mask = native.exact(_arguments(reader)[5])
    inputs = (qkv, native.exact(cos), native.exact(sin), *pasts, mask, *map(native.optional, (u, q_norm, k_norm)))
    presents = tuple(past.replace("past_key_values.", "present.") for past in pasts)
    native.env[keys], native.env[past_values] = (Value(name) for name in presents)
    attributes = dict(epsilon=eps, cache_clip=clip, key_low_bits=key_parts[2], key_high_bits=key_parts[3])
    call = FusedCall("Rope", inputs, _heads(key_parts, value_parts) | _count(q, k, key_parts) | attributes, presents)
    if reader.target is operators.attention_quantize and only_linear(reader) is not None:
        native.rotations[node] = call
        return Value("")
    q_out = native.b.fresh("q")
    native.fused("RopeCache", call.inputs, [q_out, *presents], **call.attributes)
    return Value(q_out)


@emits(operators.cache_image)
def cache_image(low: Lowering, node: Node) -> Value:
    """[B, G, T, D] of all tokens; the cache with the new ones."""
    x, cache, _, _, mask, parts, clip, _ = _arguments(node)
    native = _native(low)
    past = native.exact(cache)
    present = past.replace("past_key_values.", "present.")
    head = HeadParts(*parts)
    widths = dict(low_width=head.low, high_width=head.high, key_low_bits=head.low_bits, key_high_bits=head.high_bits)
    inputs = [native.exact(x), past, native.exact(mask)]
    image, _ = native.fused("CacheImage", inputs, [native.b.fresh("image"), present], cache_clip=clip, **widths)
    native.env[cache] = Value(present)
    return Value(image)


@emits(operators.latent_attention)
def latent_attention(low: Lowering, node: Node) -> Value:
    """[B, S, heads * value columns]; the cache with the new tokens. low_width, high_width: of vectors, result_...: of weights."""
    q, vectors, rotary, *caches, _, _, mask = _arguments(node)[:8]
    weights, rest = _arguments(node)[8:12], _arguments(node)[12:]
    _, weight_bits, widths, vector_parts, rotary_parts, own, factor, clip, _ = rest
    native, heads = _native(low), int(values.shape(q)[1])
    pasts = [native.exact(cache) for cache in caches]
    presents = [past.replace("past_key_values.", "present.") for past in pasts]
    attributes = _heads(vector_parts, rotary_parts) | dict(key_low_bits=vector_parts[2], key_high_bits=vector_parts[3])
    attributes |= {f"result_{side}_width": width for side, width in zip(_sides(weight_bits), widths, strict=True)}
    attributes |= dict(latent_heads=heads, own=own, values=values.width(node), scale=factor, cache_clip=clip)
    inputs = [*(native.exact(x) for x in (q, vectors, rotary, mask)), *pasts]
    inputs += [*map(native.tiles, weights[:2]), *map(native.exact, weights[2:])]
    name, *_ = native.fused("LatentAttention", inputs, [native.b.fresh("y"), *presents], **attributes)
    native.env[caches[0]], native.env[caches[1]] = (Value(present) for present in presents)
    return _heads_apart(native, node, name, heads)


def _count(q: Node, k: Node, key_parts: Sequence[int]) -> dict[str, int]:
    """Query heads and key heads."""
    d = HeadParts(*key_parts).head_dim
    return {"heads": values.width(q) // d, "kv_heads": values.width(k) // d}


def _attended(native: NativeLowering, node: Node) -> tuple[list[str], dict[str, Any]]:
    """Operands and attributes of attention."""
    q, keys, cached_values, _, _, mask, key_parts, value_parts, scale, window, softcap = _arguments(node)[:11]
    inputs = [native.exact(x) for x in (q, keys, cached_values, mask)]
    inputs += [native.optional(x) for x in _arguments(node)[11:15]]  # sinks, keys and values of the prefix, slopes
    attributes = _heads(key_parts, value_parts) | {"scale": scale, "window": window or 0, "softcap": softcap or 0.0}
    kv_heads = int(values.shape(keys)[1])
    return inputs, attributes | {"heads": int(values.shape(q)[2]), "kv_heads": kv_heads}


@emits(operators.attention)
def attention(low: Lowering, node: Node) -> Value:
    """[B, S, heads * D]; who turns it to heads first gets it as it is."""
    native = _native(low)
    inputs, attributes = _attended(native, node)
    (name,) = native.fused("Attention", inputs, [native.b.fresh("y")], **attributes)
    return _heads_apart(native, node, name, attributes["heads"])


def _heads_apart(native: NativeLowering, node: Node, name: str, heads: int) -> Value:
    """An attention's result [B, S, heads * D], for its readers too, which turn it to heads first."""
    for user in node.users:
        if not is_call(user, aten.transpose.int) or (int_arg(user, "dim0"), int_arg(user, "dim1")) != (1, 2):
            raise BackendError(
                f"onnx: node {user.name} reads attention {node.name} otherwise than by transpose(1, 2)", node=user.name
            )
        native.env[user] = Value(name, heads, split=True)
    return Value(name, heads)


@emits(operators.attention_quantize)
def attention_quantize(low: Lowering, node: Node) -> Pieces:
    """low_bits and high_bits are those of the result; reading the cache needs only its widths, low_width and high_width."""
    native = _native(low)
    inputs, attributes = _attended(native, node)
    bits, weight_bits, widths, clip, _ = _arguments(node)[15:]
    for side, b, width in zip(_sides(weight_bits), bits, widths, strict=True):
        attributes |= {f"{side}_bits": b, f"{side}_clip": clip, f"result_{side}_width": width}
    before = native.rotations.get(_arguments(node)[0])
    if before is None:  # queries that were turned elsewhere, or codes that others read, too
        return native.codes_apart(FusedCall("Attention", tuple(inputs), attributes))
    call = FusedCall("Attention", (*before.inputs, *inputs[4:]), before.attributes | attributes, before.outputs)
    return native.codes(node, call)
