"""Latent attention: its compressed vectors and rotary columns are cached packed, and one operator attends over them.

The linears that make keys and values of a cached vector go into the operator with their codes. Where it does not take an attention, cached
vectors are read as floats, keys and values are made of all tokens, and attention over them has no operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import HeadParts, InputPart, head_parts
from resq_compiler.backends.fused.lowering import Lowering
from resq_compiler.backends.fused.lowering_linears import stacked
from resq_compiler.backends.fused.patterns import CacheSide, calls, coded_parts
from torch.fx import Node

from resq_compiler.errors import QuantError
from resq_compiler.frontend.latent import shared_by_heads
from resq_compiler.ir import meta, values
from resq_compiler.ir.args import argument
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.linears import LinearSum, linear_sums
from resq_compiler.ir.mask_views import CausalMask
from resq_compiler.ir.views import AppendCache, Attention, Columns, MergeHeads, SplitHeads

LEFT = "keys and values are made from cached vectors, of all tokens; no kernel attends to what is made and not cached"


@dataclass(frozen=True)
class Side:
    """append_cache, what it appends to, and the parts of that."""

    node: Node
    cache: CacheSide
    parts: HeadParts


@dataclass(frozen=True)
class Expansion:
    """What the operator needs to know of an attention: both cached sides, the linears of keys and values, and the parts they read."""

    vectors: Side
    rotary: Side
    linears: tuple[LinearSum, LinearSum]
    parts: tuple[InputPart, ...]
    own: int


def lower_latents(low: Lowering, attentions: Sequence[Attention]) -> None:
    """Take attentions whose keys and values are made from cached vectors; a reason where their cache cannot be packed."""
    linears = {linear.root: linear for linear in linear_sums(low.gm)} if attentions else {}
    for attention in attentions:
        sides = _sides(low, attention)
        if isinstance(sides, str):
            low.reasons[attention.node.name] = sides
            continue
        low.caches[low.cache_inputs.index(sides[0].cache.past) // 2] = (sides[0].parts, sides[1].parts)
        found = _expansion(low, attention, sides, linears)
        if isinstance(found, str):
            _read_as_floats(low, attention, sides, found)
        else:
            _replace(low, attention, found)
    if attentions:
        low.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _replace(low: Lowering, attention: Attention, found: Expansion) -> None:
    node, vectors, rotary = attention.node, found.vectors.cache, found.rotary.cache
    lists = ([getattr(part, name) for part in found.parts] for name in ("bits", "weight_bits", "width"))
    with low.graph.inserting_before(node):
        (weight,) = stacked(low, found.linears, [found.parts])
        arguments = (
            attention.q, vectors.new, rotary.new, vectors.past, rotary.past, low.table, low.start, low.visible(), *weight, *lists,
            found.vectors.parts.attribute, found.rotary.parts.attribute, found.own, attention.scale, vectors.clip, low.target.name,
        )  # fmt: skip
        output = low.emit(operators.latent_attention, arguments, node)
        heads_first = low.emit(aten.transpose.int, (output, 1, 2), node)
    low.replace(node, heads_first)


def _read_as_floats(low: Lowering, attention: Attention, sides: tuple[Side, Side], reason: str) -> None:
    """Cached rows as floats; linears that read them without a quantizer have no kernel, and stay with the attention."""
    for side in sides:
        with low.graph.inserting_before(side.node):
            arguments = (
                side.cache.new, side.cache.past, low.table, low.start, low.visible(), side.parts.attribute, side.cache.clip,
                low.target.name,
            )  # fmt: skip
            image = low.emit(operators.cache_image, arguments, side.node)
        low.replace(side.node, image)
        for merged in [user for user in image.users if MergeHeads.of(user) is not None]:
            readers = [merged, *(user for user in merged.users if Columns.of(user) is not None)]
            low.left |= {user.name: LEFT for x in readers for user in x.users if meta.get(user, meta.LinearPart)}
    low.left[attention.node.name] = f"{reason}: {LEFT}"


def _sides(low: Lowering, attention: Attention) -> tuple[Side, Side] | str:
    """Both entries of the layer's cache, in order, or why no kernel takes them."""
    found: list[Side] = []
    for node in _appends([attention.k, attention.v]):
        side = CacheSide.of(node, low.cache_inputs)
        if isinstance(side, str):
            return side
        try:
            parts = head_parts(side.spans)
        except QuantError as error:
            return str(error)
        assert low.target.why_not_entry is not None
        reason = low.target.why_not_entry(parts.head_dim)
        if reason is not None:
            return reason
        found.append(Side(node, side, parts))
    found.sort(key=lambda one: low.cache_inputs.index(one.cache.past))
    places = [low.cache_inputs.index(one.cache.past) for one in found]
    if len(places) != 2 or places[0] % 2 or places[1] != places[0] + 1:
        return f"it reads the cache inputs {places}; expected the two of one layer"
    return found[0], found[1]


def _appends(nodes: list[Node]) -> list[Node]:
    """The nearest nodes before these that append to a cache."""
    found: list[Node] = []
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if AppendCache.of(node) is not None:
            found.append(node)
        else:
            nodes += node.all_input_nodes
    return found


def _expansion(
    low: Lowering, attention: Attention, sides: tuple[Side, Side], linears: Mapping[Node, LinearSum]
) -> Expansion | str:
    """What the operator takes, or why it does not."""
    mask = CausalMask.of(attention.mask)
    if attention.sinks is not None or attention.softcap is not None:
        return "scores with sinks or a cap"
    if mask is None or mask.window is not None or mask.attention_mask is not low.mask:
        return "a mask that is not causal_mask(attention_mask), without a window"
    pieces = argument(attention.k, "tensors") if is_call(attention.k, aten.cat.default) else []
    shared = shared_by_heads(pieces[1]) if len(pieces) == 2 else None
    rotary = next((side for side in sides if side.node is shared), None)
    split = [SplitHeads.of(x) for x in (*pieces[:1], attention.v)]
    made = [linears.get(one.x) for one in split if one is not None]
    if rotary is None or len(made) != 2 or made[0] is None or made[1] is None:
        return "keys and values that are not made by a linear each, of one vector"
    vectors = sides[1] if rotary is sides[0] else sides[0]
    parts = _parts(vectors, (made[0], made[1]))
    if isinstance(parts, str):
        return parts
    own = values.width(pieces[0])
    reasons = [low.target.why_not_head(width) for width in (own, values.width(attention.v), rotary.parts.head_dim)]
    reason = next((one for one in reasons if one is not None), None)
    if reason is not None or vectors.cache.clip != rotary.cache.clip:
        return reason or "vectors and rotary columns have different clips"
    return Expansion(vectors, rotary, (made[0], made[1]), parts, own)


def _parts(vectors: Side, linears: tuple[LinearSum, LinearSum]) -> tuple[InputPart, ...] | str:
    """What both linears read of a cached vector, each part within one of the vector's; or why the operator does not take them."""
    columns: list[list[tuple[int, int]]] = []
    for linear in linears:
        coded = coded_parts(linear)
        if not coded or any(part.on_codes or part.group_size is not None for part in coded):
            return "linears that do not read what is cached, on weight codes with one scale a row"
        if linear.bias is not None or linear.residual is not None or linear.apart is not None:
            return "linears with a bias, or that are added to something"
        read = [_columns(part.x, vectors) for part in coded]
        columns.append([one for one in read if one is not None])
        if len(columns[-1]) < len(read):
            return "linears that do not read cached vectors themselves"
    edges = [0, *(stop for _, stop in columns[0])]
    if (
        columns[0] != columns[1]
        or [start for start, _ in columns[0]] != edges[:-1]
        or edges[-1] != vectors.parts.head_dim
    ):
        return f"linears that read the columns {columns} of a vector; expected all, the same for keys and values"
    found: list[InputPart] = []
    for i, (start, stop) in enumerate(columns[0]):
        bits = [bits for bits, first, last in vectors.parts.spans if first <= start and stop <= last]
        weight_bits = max(meta.require(linear.parts[i], meta.LinearPart).weight_bits for linear in linears)
        if not bits:
            return f"columns {start}:{stop} of a vector, which is cached in the parts {vectors.parts.spans}"
        found.append(InputPart(bits[0], stop - start, 1, weight_bits))
    return tuple(found) if len(calls(found)) == 1 else f"linears of {len(found)} parts"


def _columns(x: Node, vectors: Side) -> tuple[int, int] | None:
    """The columns of a cached vector that a linear reads."""
    columns = Columns.of(x)
    merged = MergeHeads.of(x if columns is None else columns.x)
    if merged is None or merged.x is not vectors.node:
        return None
    return (0, vectors.parts.head_dim) if columns is None else (columns.start, columns.stop)
