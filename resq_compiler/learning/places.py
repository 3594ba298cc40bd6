"""Where transforms can be learned in a partitioned graph: the weights on both sides of a value, part by part.

Parts keep their columns: a learned rotation turns inside every part, so that what has 8 bits stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import STREAM_ROLES, Block, Topology
from resq_compiler.errors import PassError
from resq_compiler.ir import meta, values
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.linears import LinearSum, linear_sums, read_part
from resq_compiler.ir.views import CodedLinear, Columns, Dequantize, Embedding, Hadamard, Linear, Norm, Quantize
from resq_compiler.learning.learned import Learned, may_learn_clip
from resq_compiler.numerics.transforms import (
    HadamardRotation,
    HeadRotation,
    LearnableHeads,
    LearnableRotation,
    LearnableScaling,
    Rotation,
    Scaling,
    Transform,
)

READERS, WRITERS = (*STREAM_ROLES, "gate", "up", "head"), ("o", "down")


@dataclass(frozen=True)
class Places:
    """A partitioned graph and what it is known to be."""

    gm: GraphModule
    topology: Topology
    plan: ColumnPlan

    def check(self, name: str, pairs: bool) -> None:
        """Raise PassError where something cannot be learned. pairs: what one weight gets is undone in others, and all must be known."""
        if self.topology.mixtures or self.topology.routers:
            raise PassError(
                f"{name}: the model has experts, whose quantized operators have no gradients here; compile it without learning "
                "(learn_rotations=none, learn_blocks=false, learn_scales=false, learn_codes=false)"
            )
        if pairs and self.topology.floats:
            raise PassError(
                f"{name}: node {self.topology.floats[0].name} stays in float by the topology's overrides, and transforms are not learned "
                "around it; leave the override or the learning out",
                node=self.topology.floats[0].name,
            )

    def sums(self, block: int | None = None, *roles: str) -> Iterator[LinearSum]:
        """The linears of roles with float weights; of a block, or of all where it is None."""
        for linear in linear_sums(self.gm):
            same = block is None or linear.site.block == block
            if same and linear.site.role in roles and all(Linear.of(part) is not None for part in linear.parts):
                yield linear

    def add_stream(self, learned: Learned) -> str | None:
        """A rotation of the residual stream. Returns why there can be none, or None."""
        topology = self.topology
        if not topology.residual.fusable:
            return "U_A stays online in this model"
        if topology.online:
            return f"U_A stays online before {len(topology.online)} inputs of linears, in bases that lead out of the stream's own"
        if topology.beside:
            return f"node {topology.beside[0].name} makes values beside the stream of it"
        gains = [g for g in topology.residual.readers if (n := Norm.of(g.norm)) is not None and n.gain is not None]
        if gains:
            return f"node {gains[0].value.name} has a gain; a recipe with fold-norms has none"
        sizes = self.plan.sizes(topology.hidden_size, "attention", "mlp")
        learned.add("stream", LearnableRotation(torch.eye(topology.hidden_size), sizes))
        for linear in self.sums(None, *READERS):
            for part, fact in zip(linear.parts, linear.facts, strict=True):
                learned.change(weight_of(part), "stream", into_columns(fact.start, fact.stop))
        head = Linear.of(topology.head)
        if meta.get(topology.head, meta.LinearPart) is None and head is not None:
            if len(head.x.users) == 1:
                learned.undo(head.x, weight_of(topology.head), "stream", into_inputs)
            else:
                learned.change(weight_of(topology.head), "stream", into_inputs)
        for linear in self.sums(None, *WRITERS):
            for target in (*map(weight_of, linear.parts), *bias_of(linear)):
                learned.change(target, "stream", into_outputs)
        for writer in topology.residual.writers:
            if not writer._erased and Embedding.of(writer) is not None:
                learned.embeddings[writer] = "stream"
        return None

    def add_values(self, learned: Learned, block: Block) -> None:
        """A rotation of the values of every key/value head of a block, undone in the output projections of all that read them."""
        attention, index = block.attention, block.index
        if not attention.value_is_linear or not attention.keeps:
            return
        width, name = attention.value_dim, f"value{index}"
        readers = [a.block for a in self.topology.sharing(attention)]
        sizes = self.plan.sizes_of(width, [Site("value", index), *(Site("o", i) for i in readers)])
        learned.add(name, LearnableHeads(torch.eye(width).repeat(attention.value_heads, 1, 1), sizes))
        for linear in self.sums(index, "v", "v_b"):
            for target in (*map(weight_of, linear.parts), *bias_of(linear)):
                learned.change(target, name, into_outputs)
        for linear in (found for i in readers for found in self.sums(i, "o")):
            for part, fact in zip(linear.parts, linear.facts, strict=True):
                learned.change(weight_of(part), name, into_head_columns(fact.start, fact.stop))

    def add_gains(self, learned: Learned, block: Block) -> None:
        """Scales of what the norms of a block give, undone in the linears that read it."""
        for linear in self.sums(block.index, *READERS[:-1]):
            norm = norm_before(linear)
            if norm is None:
                continue
            name = f"gain{block.index}_{norm.name}"
            if name not in learned.transforms:
                learned.add(name, LearnableScaling(torch.ones(values.width(norm))))
                learned.norms[norm] = name
            for part, fact in zip(linear.parts, linear.facts, strict=True):
                learned.change(weight_of(part), name, out_of_columns(fact.start, fact.stop))

    def add_hidden(self, learned: Learned, block: Block) -> None:
        """Scales of the hidden channels of gated feed-forwards, written by up and undone in down, behind its Hadamard transform."""
        ups, downs = list(self.sums(block.index, "up")), list(self.sums(block.index, "down"))
        if len(ups) != 1 or len(downs) != 1 or not list(self.sums(block.index, "gate")):
            return
        (up,), (down,) = ups, downs
        turn = hadamard_before(down)
        product = turn.x if turn is not None else whole_input(down)
        if not is_call(product, aten.mul.Tensor):
            return
        name = f"hidden{block.index}"
        learned.add(name, LearnableScaling(torch.ones(values.width(product))))
        for target in (*map(weight_of, up.parts), *bias_of(up)):
            learned.change(target, name, into_outputs)
        for part, fact in zip(down.parts, down.facts, strict=True):
            learned.change(weight_of(part), name, out_of_hidden(fact.start, fact.stop, turn is not None))

    def add_clips(self, learned: Learned, nodes: list[Node]) -> None:
        """Shares of the range of quantizers; keys and values of a block have one in common, as kernels want it."""
        for node in nodes:
            clip, site = may_learn_clip(node), meta.get(node, meta.QuantizerSite)
            if clip is not None:
                of_cache = site is not None and site.kind == "kv"
                learned.add_clip(node, f"cache{site.block}" if site is not None and of_cache else node.name, clip)

    def add_codes(self, learned: Learned) -> None:
        """Factors of the scales of weight codes of the blocks."""
        for node in coded_nodes(self.gm):
            coded = CodedLinear.require(node)
            name = f"codes{len(learned.transforms)}"
            learned.add(name, LearnableScaling(torch.ones_like(coded.scales(self.gm))))
            learned.change(str(coded.scale.target), name, forward)

    def add_free_gains(self, learned: Learned) -> None:
        """Scales of what norms before quantized linears give, undone nowhere."""
        for linear in linear_sums(self.gm):
            norm = norm_before(linear)
            if norm is not None and norm not in learned.norms and linear.site.block is not None:
                name = f"gain{len(learned.transforms)}"
                learned.add(name, LearnableScaling(torch.ones(values.width(norm))))
                learned.norms[norm] = name


def coded_nodes(gm: GraphModule) -> list[Node]:
    """Parts of the linears of blocks that are on weight codes."""
    facts = ((node, meta.get(node, meta.LinearPart)) for node in gm.graph.nodes if CodedLinear.of(node) is not None)
    return [node for node, fact in facts if fact is not None and fact.site.block is not None]


Apply = Callable[[Transform, Tensor], Tensor]


def into_inputs(transform: Transform, weight: Tensor) -> Tensor:
    """Of a linear that reads the value."""
    return transform.into_inputs(weight)


def into_outputs(transform: Transform, value: Tensor) -> Tensor:
    """Of the weight or bias of a linear that writes the value."""
    return transform.into_outputs(value)


def forward(transform: Transform, value: Tensor) -> Tensor:
    """Of rows that are values."""
    return transform.forward(value)


def into_columns(start: int, stop: int) -> Apply:
    """Of a part of the linears that read a rotated value."""

    def apply(transform: Transform, weight: Tensor) -> Tensor:
        assert isinstance(transform, Rotation)
        return Rotation(transform.u[start:stop, start:stop]).into_inputs(weight)

    return apply


def into_head_columns(start: int, stop: int) -> Apply:
    """Of a part of an output projection: the same columns of every head."""

    def apply(transform: Transform, weight: Tensor) -> Tensor:
        assert isinstance(transform, HeadRotation)
        return HeadRotation(transform.u[:, start:stop, start:stop]).into_inputs(weight)

    return apply


def out_of_columns(start: int, stop: int) -> Apply:
    """Of a part of the linears that read a scaled value."""

    def apply(transform: Transform, weight: Tensor) -> Tensor:
        assert isinstance(transform, Scaling)
        return Scaling(transform.s[start:stop]).into_inputs(weight)

    return apply


def out_of_hidden(start: int, stop: int, turned: bool) -> Apply:
    """Of a part of a down projection, whose columns were turned by a Hadamard transform after they were scaled."""
    hadamard = HadamardRotation((stop - start,))

    def apply(transform: Transform, weight: Tensor) -> Tensor:
        assert isinstance(transform, Scaling)
        scaled = Scaling(transform.s[start:stop])
        if not turned:
            return scaled.into_inputs(weight)
        return hadamard.into_inputs(scaled.into_inputs(hadamard.inverse(weight)))

    return apply


def weight_of(part: Node) -> str:
    """The name of a float weight."""
    return str(Linear.require(part).weight.target)


def bias_of(linear: LinearSum) -> tuple[str, ...]:
    """The name of a linear's bias, if it has one."""
    return () if linear.bias is None else (str(linear.bias.target),)


def whole_input(linear: LinearSum) -> Node:
    """The value of which the parts of a linear read columns, before quantizers."""
    node = read_part(linear.parts[0]).x
    while True:
        image, quantizer, columns = Dequantize.of(node), Quantize.of(node), Columns.of(node)
        if image is not None:
            node = image.codes
        elif quantizer is not None:
            node = quantizer.x
        elif columns is not None:
            node = columns.x
        else:
            return node


def norm_before(linear: LinearSum) -> Node | None:
    """The norm that makes a linear's input; None where something else does, or where others than linears read it."""
    node = whole_input(linear)
    return node if Norm.of(node) is not None and linear.site.role in READERS[:-1] else None


def hadamard_before(linear: LinearSum) -> Hadamard | None:
    """The Hadamard transform before a down projection."""
    node = whole_input(linear)
    return Hadamard.of(node) if is_call(node, *Hadamard.targets) else None
