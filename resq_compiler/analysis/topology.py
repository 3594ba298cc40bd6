"""What the graph says about the model: residual stream, decoder blocks, attention and feed-forward, as nodes; found by dataflow.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from torch.fx import Node

from resq_compiler.ir import values, views
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.mask_views import CausalMask
from resq_compiler.ir.views import AppendCache

STREAM_ROLES = ("q", "k", "v", "q_a", "kv_a", "q_rope", "k_rope")
"""Roles of linears of attention that read the residual stream."""

ROLES = (*STREAM_ROLES, "q_b", "q_b_rope", "k_b", "v_b", "o")
"""Of all linears of attention; those ending in _b read compressed vectors, those in _rope make rotary columns."""


@dataclass
class ReadGroup:
    """Linears that read the residual stream through the same value. `norm` is None where they read it directly.

    online: U_A is multiplied in before them at run time, behind the norm's gain, though it fuses elsewhere.
    """

    value: Node
    norm: Node | None
    linears: list[Node]
    online: bool = False


@dataclass
class Residual:
    """The residual stream: every value that must stay in one basis, and what writes into it and reads it."""

    values: list[Node]
    writers: list[Node]  # linears and embeddings: a basis change fuses into their weight
    gained_writers: list[Node]  # norms that write into the stream: a basis change cannot pass their gain
    readers: list[ReadGroup]
    fusable: bool  # U_A can be multiplied into all writers


@dataclass
class Compressed(ReadGroup):
    """What latent attention makes queries, or keys and values, from: one vector a token.

    site: its name as a site, "latent" of keys and values, "qlatent" of queries. writer: the linear that makes it from the stream. written:
    what it makes, behind the norm where there is one. value: what the linears read, which is the cache of `written` where there is one.
    """

    _: KW_ONLY
    site: str
    writer: Node
    written: Node
    cache: Node | None = None

    @property
    def role(self) -> str:
        """Of the writer."""
        return "kv_a" if self.site == "latent" else "q_a"

    @property
    def width(self) -> int:
        """Columns of the vector."""
        return values.width(self.value)


@dataclass
class Latent:
    """The parts of latent attention, whose keys and values are made from a cached vector of each token.

    Keys and queries have columns of each head, and rotary ones, which the keys of all heads share. shared, queries_rotary: the linears
    that make these. vectors: of keys and values, and of queries where these are compressed too. rotary: the rotary columns of
    queries; joined: whole queries.
    """

    shared: Node
    queries_rotary: Node
    vectors: Sequence[Compressed]
    rotary: Node
    joined: Node


@dataclass
class Attention:
    """One attention: its operator, the linears around it, and the nodes where projections go.

    Of latent attention (`latent`), key_cache holds the rotary columns that all heads share and value_cache the compressed vectors.

    block: its number. keeper: that of the block whose keys and values it reads, its own or an earlier one; then k, v and the caches
    are the keeper's.
    """

    core: Node
    q: Node
    k: Node
    v: Node
    o: Node
    key_cache: Node
    value_cache: Node
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    value_is_linear: bool  # nothing between v and the cache: U_B fuses into v
    block: int
    keeper: int
    latent: Latent | None = None

    @property
    def keeps(self) -> bool:
        """Whether its keys and values are its own."""
        return self.block == self.keeper

    @property
    def linears(self) -> dict[str, Node]:
        """Every linear by its role; one that reads another's vector behind it."""
        if not self.keeps:
            return {"q": self.q, "o": self.o}
        if self.latent is None:
            return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        found = {vector.role: vector.writer for vector in self.latent.vectors}
        q = "q_b" if "q_a" in found else "q"
        found |= {q: self.q, f"{q}_rope": self.latent.queries_rotary, "k_rope": self.latent.shared}
        return {**found, "k_b": self.k, "v_b": self.v, "o": self.o}

    @property
    def readers(self) -> list[Node]:
        """Those that read the residual stream."""
        return [n for role, n in self.linears.items() if role in STREAM_ROLES]

    @property
    def key_dim(self) -> int:
        """Columns of queries and keys that U_C turns: those that are cached."""
        return self.head_dim if self.latent is None else values.width(self.key_cache)

    @property
    def value_heads(self) -> int:
        """Heads that values have."""
        return self.num_kv_heads if self.latent is None else self.num_heads

    @property
    def queries(self) -> tuple[Node, Node]:
        """The columns of queries that U_C turns, and what reads them."""
        return (self.view.q, self.core) if self.latent is None else (self.latent.rotary, self.latent.joined)

    @property
    def values(self) -> tuple[Node, Node]:
        """What U_B turns, and what reads it."""
        return (self.new_values, self.value_cache) if self.latent is None else (self.view.v, self.core)

    @property
    def caches(self) -> dict[str, Node]:
        """What it caches, by site."""
        if not self.keeps:
            return {}
        return {"key": self.key_cache, "value" if self.latent is None else "latent": self.value_cache}

    @property
    def compressed(self) -> dict[str, int]:
        """Columns of compressed vectors by site, and of the rotary part that heads share; nothing where attention is not latent."""
        sizes = {vector.site: vector.width for vector in self.vectors}
        return {**sizes, "rotary": self.key_dim} if sizes else {}

    @property
    def vectors(self) -> Sequence[Compressed]:
        """Compressed vectors, which have bases of their own."""
        return () if self.latent is None else self.latent.vectors

    @property
    def window(self) -> int | None:
        """Sliding window, or None."""
        mask = CausalMask.of(self.view.mask)
        return None if mask is None else mask.window

    @property
    def view(self) -> views.Attention:
        """The operator as it is now."""
        return views.Attention.require(self.core)

    @property
    def new_keys(self) -> Node:
        """Keys of the new tokens, as they enter the cache."""
        return AppendCache.require(self.key_cache).new

    @property
    def new_values(self) -> Node:
        """Values of the new tokens, as they enter the cache."""
        return AppendCache.require(self.value_cache).new


@dataclass
class Experts:
    """How a mixture chooses: `router`, the linear whose scores say which `choices` of `count` experts a token goes through.

    indices: their numbers, [B·S, k]; weights: what each counts, [B·S, k]; combined: their weighted sum.
    """

    router: Node
    indices: Node
    weights: Node
    combined: Node
    count: int
    choices: int


@dataclass
class FeedForward:
    """down(f(up linears)): `gates` are the linears that an activation follows, `ups` the others; all of `experts`, or of none.

    A factor that is made beside the stream, such as an embedding of the layer, is none of them.
    """

    gates: list[Node]
    ups: list[Node]
    down: Node
    channelwise: bool  # only elementwise operators between: hidden channels may be permuted freely
    experts: Experts | None = None

    @property
    def width(self) -> int:
        """Input channels of the down projection."""
        return values.width(views.Linear.require(self.down).x)


@dataclass
class Block:
    """A decoder block: from the cut `start` (a value of the stream) to the cut `end`."""

    index: int
    start: Node
    end: Node
    attention: Attention
    feed_forwards: list[FeedForward] = field(default_factory=list)
    routers: list[Node] = field(default_factory=list)  # of experts, and gates that weigh a shared expert

    @property
    def main_feed_forwards(self) -> list[tuple[int, FeedForward]]:
        """Those, with their numbers, whose down projections have the width that most weights have: one share of columns suits them all."""
        weights: dict[int, int] = {}
        for item in self.feed_forwards:
            width = item.width
            weights[width] = weights.get(width, 0) + width * (item.experts.count if item.experts else 1)
        return [(i, f) for i, f in enumerate(self.feed_forwards) if f.width == max(weights, key=weights.__getitem__)]


@dataclass
class Topology:
    """A validated description of a decoder."""

    residual: Residual
    blocks: list[Block]
    head: Node
    hidden_size: int
    floats: list[Node] = field(default_factory=list)  # linears that the user keeps in float
    routers: list[Node] = field(
        default_factory=list
    )  # linears that choose or weigh experts: rotated, but never quantized
    beside: list[Node] = field(
        default_factory=list
    )  # linears that make values beside the stream, of all blocks: likewise

    @property
    def readers(self) -> list[ReadGroup]:
        """The groups of linears inside blocks that read the residual stream."""
        outside = {self.head, *self.beside}
        return [group for group in self.residual.readers if not outside.issuperset(group.linears)]

    @property
    def online(self) -> list[ReadGroup]:
        """Those of them before which U_A is an operator of its own: all where it cannot be multiplied into the writers of the stream."""
        return [group for group in self.readers if group.online or not self.residual.fusable]

    @property
    def vectors(self) -> list[Compressed]:
        """The compressed vectors of latent attention, of all blocks."""
        return [vector for block in self.blocks for vector in block.attention.vectors]

    @property
    def linears(self) -> list[Node]:
        """All linears inside blocks that are to be quantized, in execution order."""
        left_out = {self.head, *self.floats, *self.routers, *self.beside}
        return [n for n in self.head.graph.nodes if is_call(n, *views.Linear.targets) and n not in left_out]

    def sharing(self, attention: Attention) -> list[Attention]:
        """All attentions that read the same keys and values, the keeper first."""
        return [block.attention for block in self.blocks if block.attention.keeper == attention.keeper]

    @property
    def keepers(self) -> list[Attention]:
        """The attentions with keys and values of their own."""
        return [block.attention for block in self.blocks if block.attention.keeps]

    @property
    def mixtures(self) -> list[tuple[Block, FeedForward, Experts]]:
        """The feed-forwards that are mixtures of experts, with their blocks."""
        return [(b, f, f.experts) for b in self.blocks for f in b.feed_forwards if f.experts is not None]
