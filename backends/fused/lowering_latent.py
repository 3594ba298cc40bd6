"""Latent attention: its compressed vectors are cached packed, and read as floats by what makes keys and values from them.

The linears that make keys and values are linears like others, of all tokens; the attention over what they make has no operator.
"""

from __future__ import annotations

from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import HeadParts, head_parts
from resq_compiler.backends.fused.lowering import Lowering
from resq_compiler.backends.fused.patterns import CacheSide
from torch.fx import Node

from resq_compiler.errors import QuantError
from resq_compiler.ir.views import AppendCache, Attention

LEFT = "keys and values are made from cached vectors, of all tokens; no kernel attends to what is made and not cached"
Side = tuple[Node, CacheSide, HeadParts]
"""append_cache, what it appends to, and the parts of that."""


def lower_latent(low: Lowering, attention: Attention) -> None:
    """Pack the cache behind an attention whose keys and values are made from cached vectors; a reason where it cannot be."""
    found = _sides(low, attention)
    if isinstance(found, str):
        low.reasons[attention.node.name] = found
        return
    for node, side, parts in found:
        with low.graph.inserting_before(node):
            arguments = (side.new, side.past, low.table, low.start, low.visible(), parts.attribute, side.clip)
            image = low.emit(operators.cache_image, (*arguments, low.target.name), node)
        low.replace(node, image)
    (_, first, keys), (_, _, values) = found
    low.caches[low.cache_inputs.index(first.past) // 2] = (keys, values)
    low.left[attention.node.name] = LEFT


def _sides(low: Lowering, attention: Attention) -> list[Side] | str:
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
        found.append((node, side, parts))
    found.sort(key=lambda one: low.cache_inputs.index(one[1].past))
    places = [low.cache_inputs.index(side.past) for _, side, _ in found]
    if len(places) != 2 or places[0] % 2 or places[1] != places[0] + 1:
        return f"it reads the cache inputs {places}; expected the two of one layer"
    return found


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
