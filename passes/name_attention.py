"""name-attention: the cache, the attention operator, its mask, and grouped heads, each as one node.

    cat(past, new)                                              -> append_cache(past, new)
    scaled_dot_product_attention(q, k, v, mask)                 -> attention(q, k, v, mask, scale), k and v repeated or not
    matmul(softmax(cap·tanh(q kᵀ scale / cap) + mask), v)       -> attention(q, k, v, mask, scale, softcap), in any such form
    the same with a learned score beside those of the keys      -> attention(q, k, v, mask, scale, softcap, sinks)
    the operators that build a mask                             -> causal_mask(attention_mask, input_ids, window)
    keys and values that a linear makes of a compressed cache   -> attention(q, k, v, ...) on them (frontend/latent.py)

Repeats of heads and masks are recognized by what they compute, not by how: they are run on index tensors and on padded,
empty-past and longer-than-window inputs, and must agree exactly. A mask that agrees with no causal or sliding-window mask stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.frontend import eager_attention, latent
from resq_compiler.frontend.capture import concrete_example
from resq_compiler.frontend.eager_attention import WrittenOut
from resq_compiler.frontend.sinks import take_share, take_sinks
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import argument, node_arg, optional_float_arg, optional_node_arg, set_argument, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, evaluate, is_call, replace, rewrite
from resq_compiler.pipeline.passes import Pass, PassContext

SDPA = aten.scaled_dot_product_attention.default
MAX_NEW, MAX_PAST = 2048, 2**20  # windows up to these are probed with as many new tokens, as long a past


@dataclass(frozen=True)
class NameAttention(Pass):
    """Name caches, attention and masks."""

    name: ClassVar[str] = "name-attention"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        done = name_caches(gm)
        env = dict(zip(graph_tools.placeholders(gm.graph), ctx.example_inputs, strict=True))
        for node in list(gm.graph.find_nodes(op="call_function", target=SDPA)):
            done += replace_core(gm, node, env)
        for softmax in list(gm.graph.find_nodes(op="call_function", target=aten.softmax.int)):
            node, sinks = take_sinks(gm, softmax, env, self.name)
            found = eager_attention.find(gm, node, lambda n: is_call(n, ops.append_cache), self.name)
            if found is not None and sinks is None:
                found.product, sinks = take_share(gm, found.product, source(node), env, self.name)
            if found is not None:
                done += replace_written_out(gm, found, env, sinks)
        gm.graph.eliminate_dead_code()
        return done + name_masks(gm, ctx)


def name_caches(gm: GraphModule) -> int:
    """cat(past, new) along tokens, where past is a graph input."""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.cat.default)):
        pieces = argument(node, "tensors")
        if len(pieces) == 2 and pieces[0].op == "placeholder" and argument(node, "dim") in (-2, 2):
            rewrite(node, ops.append_cache, tuple(pieces), NameAttention.name)
            done += 1
    return done


def replace_core(gm: GraphModule, node: Node, env: dict[Node, Tensor]) -> int:
    """Replace aten.scaled_dot_product_attention by ops.attention on the un-repeated keys and values."""
    if argument(node, "is_causal"):
        raise TopologyError(
            f"node {node.name}: attention with is_causal=True has no mask for padding; expected an explicit mask",
            node=node.name,
        )
    q, scale = node_arg(node, "query"), optional_float_arg(node, "scale")
    heads = values.shape(q)[1]
    k, v = (node_arg(node, name) for name in ("key", "value"))
    if not latent.expands(k, v, heads, NameAttention.name):
        k, v = (unrepeated(gm, x, values.shape(x)[1], env) for x in (k, v))  # which may repeat the cached heads, or not
    args = (q, k, v, argument(node, "attn_mask"), 1 / math.sqrt(values.width(q)) if scale is None else scale, None)
    rewrite(node, ops.attention, args, NameAttention.name)
    return 1


def replace_written_out(gm: GraphModule, found: WrittenOut, env: dict[Node, Tensor], sinks: Node | None) -> int:
    """Replace the last product of an attention in single operators by ops.attention; [B·H, S, D] becomes [B, H, S, D] around it."""
    node, q = found.product, found.q
    with gm.graph.inserting_before(node):
        if is_flat(q):
            q = emit(gm.graph, aten.unflatten.int, (q, 0, [-1, heads_of(q, env)]), node, NameAttention.name)
        heads = values.shape(q)[1]
        k = unrepeated(gm, found.k, heads, env, lambda t: (t.flatten(0, 1) if is_flat(found.k) else t).mT)
        v = unrepeated(gm, found.v, heads, env, lambda t: t.flatten(0, 1) if is_flat(found.v) else t)
        beside = () if sinks is None else (sinks,)
        args = (q, k, v, found.mask, found.scale, found.softcap, *beside)
        new = emit(gm.graph, ops.attention, args, node, NameAttention.name)
        if is_flat(node):
            new = emit(gm.graph, aten.flatten.using_ints, (new, 0, 1), node, NameAttention.name)
    replace(node, new)
    return 1


def is_flat(node: Node) -> bool:
    """[B·H, S, D] rather than [B, H, S, D]."""
    return len(values.shape(node)) == 3


def heads_of(flat: Node, env: dict[Node, Tensor]) -> int:
    """H of a value [B·H, S, D]."""
    return values.shape(flat)[0] // env[graph_tools.placeholders(flat.graph)[0]].shape[0]


def unrepeated(
    gm: GraphModule, value: Node, heads: int, env: dict[Node, Tensor], form: Callable[[Tensor], Tensor] = lambda t: t
) -> Node:  # fmt: skip
    """The cache entry [B, G, T, D] that `value` repeats for grouped heads: form([B, H, T, D])."""
    root = value
    while is_call(root, *VIEW_OPS):
        root = source(root)
    if not is_call(root, ops.append_cache):
        raise TopologyError(
            f"node {value.name}: attention keys and values should come from append_cache(past, new), got {root.format_node()} "
            "or, in latent attention, be made from it by a linear",
            node=value.name,
        )
    shape = values.shape(root)
    index = torch.arange(math.prod(shape)).reshape(shape)
    result = evaluate(gm, value, {**env, root: index})
    if shape[1] == 1 and torch.equal(result, form(index)):
        return root  # one head for all queries: the attention operator spreads it
    if heads % shape[1] or not torch.equal(result, form(index.repeat_interleave(heads // shape[1], 1))):
        raise TopologyError(
            f"node {value.name}: expected the {shape[1]} cached heads repeated to {heads}; it computes something else",
            node=value.name,
        )
    return root


def name_masks(gm: GraphModule, ctx: PassContext) -> int:
    """Replace each mask by causal_mask when it computes the same on every probe."""
    inputs = graph_tools.placeholders(gm.graph)
    users: dict[Node, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=ops.attention):
        mask = optional_node_arg(node, "mask")
        if mask is not None and not is_call(mask, ops.causal_mask):
            users.setdefault(mask, []).append(node)
    named: dict[int | None, Node] = {}
    for mask, readers in users.items():
        window = recognized_window(gm, mask, inputs, ctx)
        if isinstance(window, str):
            ctx.note(f"mask {mask.name} is neither causal nor a sliding window: kept as its own operators")
            continue
        if window not in named:
            first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with gm.graph.inserting_before(first):
                named[window] = emit(
                    gm.graph, ops.causal_mask, (inputs[1], inputs[0], window), mask, NameAttention.name
                )
        for reader in readers:
            set_argument(reader, "mask", named[window])
    gm.graph.eliminate_dead_code()
    return len(named)


def recognized_window(gm: GraphModule, mask: Node, inputs: list[Node], ctx: PassContext) -> int | None | str:
    """The window of the causal mask that `mask` computes; None = no window, "unknown" = another mask."""
    before = graph_tools.ancestors([mask])
    constants = {a for n in before for a in n.args if type(a) is int and 1 < a < 2**31}
    constants |= {w for n in before if n.op == "get_attr" and (w := tabled_window(graph_tools.get_tensor(gm, n)))}
    longest = max((c for c in constants if c < MAX_PAST), default=0)
    for window in (None, *sorted(constants)):
        if all(_agrees(gm, mask, inputs, ctx, window, new, past) for new, past in _probes(longest)):
            return window
    return "unknown"


def tabled_window(table: Tensor) -> int | None:
    """The most keys that a row of a table of masks [..., N, N] shows, where these are fewer than all."""
    if table.dtype != torch.bool or table.dim() < 2 or table.shape[-1] != table.shape[-2] or table.is_meta:
        return None
    most = int(table.sum(-1).max())
    return most if 1 < most < table.shape[-1] else None


def _probes(longest: int) -> list[tuple[int, int]]:
    """(new tokens, past length) pairs: usual, empty past, and beyond the longest window the mask could have."""
    sizes = [(5, 7), (2, 9), (6, 0), (3, longest + 2)]
    return sizes + ([(longest + 3, 0)] if longest <= MAX_NEW else [])


def _agrees(
    gm: GraphModule, mask: Node, inputs: list[Node], ctx: PassContext, window: int | None, new: int, past: int
) -> bool:  # fmt: skip
    ids, attention_mask, positions = concrete_example(2, (), new=new, past=past)
    entries = [torch.zeros(1).expand(2, t.shape[1], past, t.shape[3]) for t in ctx.example_inputs[3:]]
    env: dict[Node, Any] = dict(zip(inputs, (ids, attention_mask, positions, *entries), strict=True))
    try:
        value = evaluate(gm, mask, env)
    except RuntimeError:
        return False
    expected = ops.causal_mask(attention_mask, ids, window)
    if value.dtype != torch.bool:
        if not bool(((value == 0) | (value <= -1e4)).all()):
            return False
        value = value == 0
    if value.dim() == 4 and torch.equal(value, value[:, :1].expand_as(value)):  # all heads see the same
        value = value[:, :1].expand_as(expected)
    seen = expected.any(-1, keepdim=True)  # rows of padding see nothing; what a mask says there does not matter
    return value.shape == expected.shape and torch.equal(value & seen, expected)
