"""What the graph says about the model: residual stream, decoder blocks, attention and feed-forward, as nodes; found by dataflow.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from resq_compiler.ir import views
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import AppendCache, CausalMask


@dataclass
class ReadGroup:
    """Linears that read the residual stream through the same value. `norm` is None where they read it directly."""

    value: Node
    norm: Node | None
    linears: list[Node]


@dataclass
class Residual:
    """The residual stream: every value that must stay in one basis, and what writes into it and reads it."""

    values: list[Node]
    writers: list[Node]  # linears and embeddings: a basis change fuses into their weight
    gained_writers: list[Node]  # norms that write into the stream: a basis change cannot pass their gain
    readers: list[ReadGroup]
    fusable: bool  # U_A can be multiplied into all writers


@dataclass
class Attention:
    """One attention: its operator, the linears around it, and the nodes where projections go."""

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
class FeedForward:
    """down(f(up linears)): `gates` are the linears that an activation follows, `ups` the others."""

    gates: list[Node]
    ups: list[Node]
    down: Node
    channelwise: bool  # only elementwise operators between: hidden channels may be permuted freely


@dataclass
class Block:
    """A decoder block: from the cut `start` (a value of the stream) to the cut `end`."""

    index: int
    start: Node
    end: Node
    attention: Attention
    feed_forwards: list[FeedForward] = field(default_factory=list)


@dataclass
class Topology:
    """A validated description of a decoder."""

    residual: Residual
    blocks: list[Block]
    head: Node
    hidden_size: int
    floats: list[Node] = field(default_factory=list)  # linears that the user keeps in float

    @property
    def readers(self) -> list[ReadGroup]:
        """The groups of linears inside blocks that read the residual stream."""
        return [group for group in self.residual.readers if self.head not in group.linears]

    @property
    def linears(self) -> list[Node]:
        """All linears inside blocks that are to be quantized, in execution order."""
        left_out = {self.head, *self.floats}
        return [n for n in self.head.graph.nodes if is_call(n, aten.linear.default) and n not in left_out]
