"""insert-prefix: tokens with massive activations come before every sequence, as constant keys and values.

    attention(q, k, v, mask)  -> attention(q, prepend(prefix_k, k), prepend(prefix_v, v), see_prefix(mask, P))
    position_ids              -> position_ids + P

The first token of a sequence, and the first of some delimiters, are attention sinks: hundreds of times the size of others in the
residual stream, they stretch the range of whatever they are quantized with. Behind such tokens no others grow. The prefix runs through
the float graph once; its keys and values stay float and take no place in the cache, so inputs and outputs of the model are as before.

Not exact: the compiled model is the float model behind the prefix. Source: PrefixQuant, arXiv 2410.05265. Differs: sizes are norms in the
residual stream (the same in every basis), not peaks of the input of down projections.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import executor
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.args import node_arg, set_argument
from resq_compiler.ir.graph_tools import aten, emit, is_call
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import processes


@dataclass(frozen=True)
class InsertPrefix(Pass):
    """Find the tokens, and put their keys and values before those of every sequence.

    massive: times the median size of a window's tokens (the ratio of PrefixQuant). most: tokens of a prefix.
    """

    name: ClassVar[str] = "insert-prefix"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    massive: float = option(64.0, 1)
    most: int = option(8, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if any(is_call(node, ops.prepend) for node in gm.graph.nodes):
            return 0
        topology = ctx.facts.get(Topology)
        require_causal_masks(topology)
        before = find_massive(gm, topology, ctx.statistics_windows, self.massive)
        tokens = processes.current().agreed(choose(before, ctx.bos_token, self.most))
        if not tokens:
            ctx.note(
                f"prefix_tokens: no token of the calibration text is {self.massive:g} times the median size; none were inserted"
            )
            return 0
        insert(gm, topology, tokens)
        after = find_massive(gm, topology, ctx.statistics_windows, self.massive)
        ctx.lines.append(f"prefix: token ids {tokens}")
        ctx.lines.append(
            f"massive tokens a window: {before.per_window:.2f} before, {after.per_window:.2f} behind the prefix"
        )
        ctx.note(f"prefix_tokens: every sequence stands behind the tokens {tokens}; positions start at {len(tokens)}")
        return len(topology.blocks)


@dataclass
class Massive:
    """Massive tokens of the calibration windows: how often each id was one, as a window's first token and elsewhere."""

    windows: int = 0
    first: Counter[int] = field(default_factory=Counter)
    later: Counter[int] = field(default_factory=Counter)

    @property
    def per_window(self) -> float:
        """How many there are in a window, on average."""
        return (self.first.total() + self.later.total()) / max(self.windows, 1)


@torch.no_grad()
def find_massive(gm: GraphModule, topology: Topology, windows: Tensor, ratio: float) -> Massive:
    """Tokens of windows [n, length] whose value in the residual stream is, behind some block, `ratio` times their window's median."""
    found, ends = Massive(), [block.end for block in topology.blocks]
    schedule = executor.Schedule(gm, ends[-1:], graph_tools.placeholders(gm.graph))
    for ids in executor.batches(windows):
        marked = torch.zeros(ids.shape, dtype=torch.bool)
        see = functools.partial(mark, marked=marked, ratio=ratio)
        schedule.run(executor.first_tokens(gm, ids), dict.fromkeys(ends, see))
        found.windows += len(ids)
        found.first.update(ids[:, :1][marked[:, :1]].tolist())
        found.later.update(ids[:, 1:][marked[:, 1:]].tolist())
    return found


def mark(stream: Tensor, marked: Tensor, ratio: float) -> None:
    """Mark the massive tokens of a value of the stream [B, S, d] in marked [B, S]."""
    size = stream.norm(dim=-1)
    marked |= (size > ratio * size.median(dim=1, keepdim=True).values).to(marked.device)


def choose(found: Massive, bos: int | None, most: int = 8) -> list[int]:
    """As many tokens as a window has massive ones: the most frequent that do not need the first place, then one that has it.

    That one is the beginning-of-sequence token where the model has one, else the most frequent first token.
    """
    count = min(math.ceil(found.per_window), most)
    if count == 0:
        return []
    first = [bos] if bos is not None else [token for token, _ in found.first.most_common(1)]
    later = [token for token, _ in found.later.most_common() if token not in first]
    return later[: count - len(first)] + first


def require_causal_masks(topology: Topology) -> None:
    """Raise PassError where a mask is more than a choice of keys."""
    for block in topology.blocks:
        attention = block.attention.view
        if not is_call(attention.mask, ops.causal_mask):
            found = attention.mask.format_node() if attention.mask is not None else None
            raise PassError(
                f"node {attention.node.name}: prefix tokens need attention whose mask is causal_mask(...), got {found}; "
                "positions that go into the mask (ALiBi) have no place for them: compile with prefix_tokens=none",
                node=attention.node.name,
            )


@torch.no_grad()
def insert(gm: GraphModule, topology: Topology, tokens: list[int]) -> None:
    """Run the tokens through the graph, and rewrite every attention, and the positions."""
    caches = [tuple(b.attention.caches.items()) for b in topology.blocks]
    env = executor.first_tokens(gm, torch.tensor([tokens]))
    executor.Schedule(gm, [node for pair in caches for _, node in pair], env).run(env)
    made_by, masks = InsertPrefix.name, dict[Node, Node]()
    for block, pair in zip(topology.blocks, caches, strict=True):
        core, mask = block.attention.core, node_arg(block.attention.core, "mask")
        if mask not in masks:
            with gm.graph.inserting_after(mask):
                masks[mask] = emit(gm.graph, ops.see_prefix, (mask, len(tokens)), mask, made_by)
        set_argument(core, "mask", masks[mask])
        for kind, cache in pair:
            prefix = graph_tools.add_tensor(
                gm, f"resq.prefix_{kind}.{block.index}", env[cache].cpu().contiguous(), made_by
            )
            readers = [node for node in cache.users if node.op != "output"]
            before = core if readers == [core] else min(readers)
            with gm.graph.inserting_before(before):
                whole = emit(gm.graph, ops.prepend, (prefix, cache), cache, made_by)
            for reader in readers:
                reader.replace_input_with(cache, whole)
    shift_positions(gm, len(tokens))


def shift_positions(gm: GraphModule, count: int) -> None:
    """Whatever reads position_ids reads them `count` later."""
    positions = graph_tools.placeholders(gm.graph)[2]
    readers = list(positions.users)
    with gm.graph.inserting_after(positions):
        shifted = emit(gm.graph, aten.add.Tensor, (positions, count), positions, InsertPrefix.name)
    for reader in readers:
        reader.replace_input_with(positions, shifted)
