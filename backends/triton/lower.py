"""Lower a quantized graph to the operators of `custom_ops`.

    columns + quantize (+ rms_norm)                      -> norm_quantize
    quantized_linear + ... + add (+ bias) (+ residual)   -> mixed_linear; linears of one input stacked
    hadamard(act(gate) * up) + quantize                  -> hadamard_quantize
    rope, U_C, quantize_dequantize, append_cache         -> rope_cache       inputs past_key_i, past_value_i become packed pages
    attention (+ the quantization of o's input)          -> attention, attention_quantize

Everything else in the graph (embedding, lm_head, norms that feed a projection) is torch and stays. A quantized node that cannot be
taken is listed with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from resq_compiler.backends.triton import custom_ops  # noqa: F401  (registers the operators)
from resq_compiler.backends.triton.formats import HeadLayout, PartLayout, head_layout, pack_weight
from resq_compiler.backends.triton.hadamard_quantize import why_not_fused
from resq_compiler.backends.triton.match import (
    Linear,
    cache_side,
    clip_of,
    common_source,
    gated,
    launches,
    leftover,
    linear_from,
    part_layout,
    split_hadamard,
    strip,
    why_not_linear,
)
from resq_compiler.backends.triton.source import CodesAt
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import BackendError, QuantError
from resq_compiler.frontend.capture import EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST
from resq_compiler.ir import graph_tools, ops, verify

aten = torch.ops.aten
triton_ops = torch.ops.resq_triton
MADE_BY = "lower-triton"
QUANTIZED = {ops.quantize, ops.quantized_linear, ops.weight_only_linear, ops.attention}
TORCH_READERS = {aten.embedding.default, aten.linear.default, ops.project, ops.project_heads}


@dataclass
class Lowered:
    """A lowered graph. Inputs: input_ids, attention_mask, position_ids, then `table`, `start`, and two tensors a layer: pages of
    a packed layer (layouts in `caches`), past key and value of another (None there). Outputs: logits, then key and value of the
    layers that are not packed. `places`: where the weight codes of the quantized graph went.
    `heads`: key/value heads and their width, of each cache input."""

    graph_module: GraphModule
    caches: list[tuple[HeadLayout, HeadLayout] | None]
    reasons: dict[str, str] = field(default_factory=dict)
    places: dict[str, CodesAt] = field(default_factory=dict)
    heads: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Codes:
    """Packed activations of one launch: part layouts and the four values."""

    layouts: tuple[PartLayout, ...]
    values: tuple[Node, Node, Node, Node]


def lower(gm: GraphModule, dtype: torch.dtype = torch.float32, allow_fallback: bool = False) -> Lowered:
    """Lower `gm` in place.

    Args:    dtype: of everything between the integers (residual stream, queries, logits' input); scales stay float32.
             allow_fallback: leave what cannot be taken to torch instead of raising; the reasons are in the result.
    Raises:  BackendError: quantized nodes that no kernel takes, each with its reason.
    """
    lowering = _Lowering(gm, dtype)
    lowering.attentions()
    lowering.linears()
    lowering.finish()
    if lowering.reasons and not allow_fallback:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in sorted(lowering.reasons.items()))
        raise BackendError(
            f"backend triton cannot take {len(lowering.reasons)} nodes:{listed}\n"
            "use backend='reference', or TritonBackend(allow_fallback=True) to leave them to torch"
        )
    lowered = Lowered(gm, lowering.caches, lowering.reasons, lowering.places, lowering.heads)
    devices = [t.device for t in gm.buffers() if not t.is_meta]
    verify.propagate_shapes(gm, tuple(t.to(devices[0] if devices else "cpu") for t in example_inputs(lowered)))
    return lowered


def example_inputs(
    lowered: Lowered, batch: int = EXAMPLE_BATCH, new: int = EXAMPLE_NEW, past: int = EXAMPLE_PAST
) -> tuple[Tensor, ...]:
    """Zeros in the order of a lowered graph's inputs, with a cache of one page a sequence (past + new <= PAGE)."""
    ids, total = torch.zeros(batch, new, dtype=torch.int64), past + new
    table = torch.arange(batch, dtype=torch.int32)[:, None]
    start = torch.full((batch,), past, dtype=torch.int32)
    caches = []
    for i, (heads, width) in enumerate(lowered.heads):
        layouts = lowered.caches[i // 2]
        paged = layouts and torch.zeros(batch, heads, layouts[i % 2].page_bytes, dtype=torch.int8)
        caches.append(torch.zeros(batch, heads, past, width) if paged is None else paged)
    return ids, torch.ones(batch, total, dtype=torch.int64), ids.clone(), table, start, *caches


class _Lowering:
    """The state of one lowering: the graph, the inputs that attention layers share, and the reasons so far."""

    def __init__(self, gm: GraphModule, dtype: torch.dtype):
        self.gm, self.graph, self.dtype = gm, gm.graph, dtype
        self.reasons: dict[str, str] = {}
        self.inputs = graph_tools.placeholders(gm.graph)
        self.caches: list[tuple[HeadLayout, HeadLayout] | None] = [None] * ((len(self.inputs) - 3) // 2)
        shapes = [node.meta["val"].shape for node in self.inputs[3:]]
        self.heads = [(int(shape[1]), int(shape[3])) for shape in shapes]
        with self.graph.inserting_after(self.inputs[2]):
            self.start = self.graph.placeholder("cache_start")
        with self.graph.inserting_after(self.inputs[2]):
            self.table = self.graph.placeholder("cache_table")
        self.mask: Node | None = None
        self.replaced: dict[Node | None, Node] = {}
        self.codes: dict[tuple[Node, ...], list[Codes]] = {}
        self.attention_sites: dict[Node, tuple] = {}
        self.places: dict[str, CodesAt] = {}

    def emit(self, target: Callable, args: tuple, like: Node) -> Node:
        return graph_tools.emit(self.graph, target, args, like, MADE_BY)

    def four(self, node: Node) -> tuple[Node, Node, Node, Node]:
        """The four results of a quantizing operator."""
        return tuple(self.emit(operator.getitem, (node, i), node) for i in range(4))  # type: ignore[return-value]

    # attention ---------------------------------------------------------------------------------------------------------

    def attentions(self) -> None:
        """Replace every attention whose cache is quantized, and make its cache inputs pages."""
        for node in list(self.graph.find_nodes(op="call_function", target=ops.attention)):
            reason = self.attention(node)
            if reason is not None:
                self.reasons[node.name] = reason

    def attention(self, node: Node) -> str | None:
        q, k, v, mask, scale, softcap = (*node.args, *[None] * (6 - len(node.args)))
        if graph_tools.is_call(mask, ops.see_prefix):
            return "it has prefix tokens, which the kernel does not take: compile with prefix_tokens=none"
        if not graph_tools.is_call(mask, ops.causal_mask) or mask.args[0] is not self.inputs[1]:
            return "its mask is not causal_mask(attention_mask, ...), which is all the kernel computes"
        sides = [cache_side(x, self.inputs) for x in (k, v)]
        for side in sides:
            if isinstance(side, str):
                return side
        (key_past, key, key_parts, clip), (value_past, value, value_parts, value_clip) = sides
        layer, place = divmod(self.inputs.index(key_past) - 3, 2)
        if place != 0 or self.inputs.index(value_past) != self.inputs.index(key_past) + 1 or clip != value_clip:
            return "keys and values come from different layers or have different clips"
        try:
            layouts = head_layout(key_parts), head_layout(value_parts)
        except QuantError as e:
            return str(e)
        if layouts[0].head_dim != layouts[1].head_dim:
            return f"keys of {layouts[0].head_dim} and values of {layouts[1].head_dim} columns a head"
        self.replace_attention(node, q, key, value, clip, layouts, (key_past, value_past), scale, softcap, mask.args)
        self.caches[layer] = layouts
        return None

    def replace_attention(self, node, q, key, value, clip, layouts, pasts, scale, softcap, mask_args) -> None:
        q, key, u, norms, eps, rotary = strip(q, key)
        parts = [[la.low, la.high, la.low_bits, la.high_bits] for la in layouts]
        with self.graph.inserting_before(node):
            flat = [self.heads_last(x, node) for x in (q, key, value)]
            if u is not None and graph_tools.get_tensor(self.gm, u).dim() == 2:
                u = self.emit(aten.unsqueeze.default, (u, 0), node)
            cos, sin = self.rotary(rotary, node)
            shared = (*pasts, self.table, self.start)
            appended = self.emit(
                triton_ops.rope_cache.default, (*flat, cos, sin, u, *shared, *norms, eps, clip, *parts), node
            )
            window = mask_args[2] if len(mask_args) > 2 else None
            arguments = (appended, *shared, self.visible(), *parts, scale, window, softcap)
            output = self.emit(triton_ops.attention.default, arguments, node)
            heads_first = self.emit(aten.transpose.int, (output, 1, 2), node)
        self.attention_sites[heads_first] = (arguments, layouts[1])
        self.replace(node, heads_first)

    def heads_last(self, x: Node, node: Node) -> Node:
        """x [B, H, S, D] as [B, S, H * D]: what it was split from, if it was."""
        return x.args[0] if graph_tools.is_call(x, ops.split_heads) else self.emit(ops.merge_heads, (x,), node)

    def rotary(self, rotary: tuple[Node, Node] | None, node: Node) -> tuple[Node, Node]:
        """cos and sin [B, S, R]; without rotation, zero columns of something that has the right leading dimensions."""
        if rotary is not None:
            return tuple(self.emit(aten.squeeze.dim, (table, 1), node) for table in rotary)  # type: ignore[return-value]
        floats = self.emit(
            aten.to.dtype, (self.emit(aten.unsqueeze.default, (self.inputs[2], 2), node), torch.float32), node
        )
        nothing = self.emit(ops.columns, (floats, 0, 0), node)
        return nothing, nothing

    def visible(self) -> Node:
        """attention_mask != 0, once."""
        if self.mask is None:
            last = graph_tools.placeholders(self.graph)[-1]
            with self.graph.inserting_after(last):
                self.mask = self.emit(aten.ne.Scalar, (self.inputs[1], 0), last)
        return self.mask

    # quantized inputs of linears ----------------------------------------------------------------------------------------

    def codes_for(self, key: tuple[Node, ...], before: Node) -> list[Codes]:
        """The packed form of a linear's quantized input, one Codes for each launch it takes; made once for all its users."""
        if key not in self.codes:
            with self.graph.inserting_before(before):
                self.codes[key] = self.make_codes(key)
        return self.codes[key]

    def make_codes(self, key: tuple[Node, ...]) -> list[Codes]:
        layouts = [part_layout(node) for node in key]
        groups = launches(layouts)
        clip = clip_of(key[0])
        if len(groups) == 1:
            same = all(clip_of(node) == clip for node in key)
            fused = (self.attention_codes(key, layouts, clip) if same else None) or self.hadamard_codes(key, layouts)
            if fused is not None:
                return [fused]
        source, norm = common_source(key)
        whole = source is not None and len(groups) == 1
        weight = bias = None
        name, eps = "none", 0.0
        if whole and norm is not None:
            name, source, weight, bias, eps = norm
        made, first = [], 0
        for launch in groups:
            nodes = key[first : first + len(launch)]
            first += len(launch)
            inputs = [node.args[0] for node in nodes]
            x = (
                source
                if whole
                else inputs[0]
                if len(inputs) == 1
                else self.emit(aten.cat.default, (inputs, -1), nodes[0])
            )
            bits, widths = [la.bits for la in launch], [la.width for la in launch]
            clips = {la.packed: clip_of(node) for la, node in zip(launch, nodes, strict=True)}
            kept = (clips.get(True, 1.0), clips.get(False, 1.0))
            arguments = (x, weight, bias, name, eps, *kept, bits, widths, launch[0].groups)
            made.append(Codes(launch, self.four(self.emit(triton_ops.norm_quantize.default, arguments, nodes[-1]))))
        return made

    def attention_codes(self, key: tuple[Node, ...], layouts: list[PartLayout], clip: float) -> Codes | None:
        """o's input: every part merge_heads(columns(attention)), split as the values are -> quantized by the attention kernel."""
        sources = []
        for node in key:
            merged = node.args[0]
            piece = merged.args[0] if graph_tools.is_call(merged, ops.merge_heads) else None
            sources.append(piece.args if graph_tools.is_call(piece, ops.columns) else (piece, 0, layouts[0].width))
        site = self.attention_sites.get(sources[0][0])
        if site is None or any(s[0] is not sources[0][0] for s in sources):
            return None
        arguments, values = site
        spans = [(s[1], s[2]) for s in sources]
        expected = [(a, b) for a, b in ((0, values.low), (values.low, values.head_dim)) if b > a]
        containers = [values.low > 0, values.high > 0]
        if spans != expected or [any(la.packed for la in layouts), any(not la.packed for la in layouts)] != containers:
            return None
        bits, widths = [la.bits for la in layouts], [la.width for la in layouts]
        node = self.emit(triton_ops.attention_quantize.default, (*arguments, bits, widths, clip), key[-1])
        return Codes(tuple(layouts), self.four(node))

    def hadamard_codes(self, key: tuple[Node, ...], layouts: list[PartLayout]) -> Codes | None:
        """down's input: hadamard(act(gate) * up), or hadamard of anything else, in one quantizer; parts have transforms of their own."""
        source = split_hadamard(key, layouts)
        if source is None or any(la.groups != 1 or why_not_fused(la.columns) is not None for la in layouts):
            return None
        transpose = bool(source.args[1]) if len(source.args) > 1 else False
        gate, up, activation = gated(source.args[0])
        bits, widths = [la.bits for la in layouts], [la.width for la in layouts]
        arguments = (gate, up, bits, widths, activation, transpose, [clip_of(node) for node in key])
        return Codes(tuple(layouts), self.four(self.emit(triton_ops.hadamard_quantize.default, arguments, key[-1])))

    # linears ------------------------------------------------------------------------------------------------------------

    def linears(self) -> None:
        """Replace linears, those of one input together."""
        groups: dict[tuple[Node, ...], list[Linear]] = {}
        for linear in self.find_linears():
            reason = why_not_linear(linear)
            if reason is None:
                groups.setdefault(linear.key, []).append(linear)
            else:
                self.reasons |= {piece.name: reason for piece in linear.pieces}
        for linears in groups.values():
            self.replace_linears(linears)

    def find_linears(self) -> list[Linear]:
        """All linears in order. Two that meet in one addition (parallel attention and feed-forward) share no root: one adds."""
        found, seen, roots = [], set(), set()
        for node in self.graph.find_nodes(op="call_function", target=ops.quantized_linear):
            if node not in seen:
                linear = linear_from(self.gm, node)
                linear = linear.without_residual() if linear.root in roots else linear
                roots.add(linear.root)
                seen.update(linear.pieces)
                found.append(linear)
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return sorted(found, key=lambda linear: order[linear.root])

    def replace_linears(self, linears: list[Linear]) -> None:
        alone = len(linears) == 1
        first = linears[0].root  # of all roots the earliest, and after the quantizers of its input
        codes = self.codes_for(linears[0].key, first)
        stacked = self.stack(linears, [c.layouts for c in codes])
        with self.graph.inserting_before(first):
            y, bias = self.residual(linears[0]) if alone else None, self.stack_bias(linears)
            for i, (made, weight) in enumerate(zip(codes, stacked, strict=True)):
                bits, widths = [la.bits for la in made.layouts], [la.width for la in made.layouts]
                ends = (bias if i == len(codes) - 1 else None, y)
                arguments = (*made.values, *weight, *ends, bits, widths, made.layouts[0].groups, self.dtype)
                y = self.emit(triton_ops.mixed_linear.default, arguments, first)
        start = 0
        for linear in linears:
            stop = start + graph_tools.get_tensor(self.gm, linear.pieces[0].args[1]).shape[0]
            self.replace(linear.root, y if alone else self.slice(linear, y, start, stop))
            start = stop

    def slice(self, linear: Linear, y: Node, start: int, stop: int) -> Node:
        """One linear's share of a stacked product, with its residual."""
        with self.graph.inserting_before(linear.root):
            share = self.emit(ops.columns, (y, start, stop), linear.root)
            return (
                share
                if linear.residual is None
                else self.emit(aten.add.Tensor, (share, self.residual(linear)), linear.root)
            )

    def residual(self, linear: Linear) -> Node | None:
        """What a linear's residual is by now: it may have been another linear's root."""
        return self.replaced.get(linear.residual, linear.residual)

    def replace(self, old: Node, new: Node) -> None:
        """Put a node in the place of another of the same shape."""
        if "val" in old.meta:
            new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)
        self.replaced[old] = new

    def stack(self, linears: list[Linear], launches: list[tuple[PartLayout, ...]]) -> list[list[Node]]:
        """Packed weights of the linears stacked along their outputs, one set of four tensors for each launch."""
        made, first = [], 0
        for i, layouts in enumerate(launches):
            parts = []
            for j, layout in enumerate(layouts, first):
                tensors = [
                    [graph_tools.get_tensor(self.gm, piece.pieces[j].args[a]) for piece in linears] for a in (1, 2)
                ]
                parts.append((torch.cat(tensors[0]), torch.cat(tensors[1]), layout))
            first += len(layouts)
            packed = pack_weight(parts)
            nothing = packed.scale.new_empty(packed.out_features, 0, dtype=torch.int8)
            tensors = dict(low=packed.low, high=packed.high, scale=packed.scale, row_sum=packed.row_sum)
            prefix = f"packed.{linears[0].root.name}_{i}"
            self.note_places(linears, layouts, first - len(layouts), prefix)
            made.append([self.tensor(f"{prefix}.{name}", nothing if t is None else t) for name, t in tensors.items()])
        return made

    def note_places(self, linears: list[Linear], layouts: tuple[PartLayout, ...], first: int, prefix: str) -> None:
        """Remember where each weight's codes go."""
        for j, layout in enumerate(layouts, first):
            start, target = 0, f"{prefix}.{'low' if layout.packed else 'high'}"
            for linear in linears:
                qdata = linear.pieces[j].args[1]
                stop = start + graph_tools.get_tensor(self.gm, qdata).shape[0]
                self.places[str(qdata.target)] = CodesAt(target, layout, start, stop)
                start = stop

    def stack_bias(self, linears: list[Linear]) -> Node | None:
        if all(linear.bias is None for linear in linears):
            return None
        biases = []
        for linear in linears:
            n = graph_tools.get_tensor(self.gm, linear.pieces[0].args[1]).shape[0]
            scale = graph_tools.get_tensor(self.gm, linear.pieces[0].args[2])
            biases.append(scale.new_zeros(n) if linear.bias is None else graph_tools.get_tensor(self.gm, linear.bias))
        return self.tensor(f"packed.{linears[0].root.name}.bias", torch.cat(biases))

    def tensor(self, target: str, value: Tensor) -> Node:
        return graph_tools.add_tensor(self.gm, target, value, MADE_BY)

    # the end ------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Outputs and inputs of the lowered graph, then dead code; what quantized operators are left gets a reason."""
        (output,) = self.graph.find_nodes(op="output")
        logits, *present = output.args[0]
        kept = [x for i, x in enumerate(present) if self.caches[i // 2] is None]
        output.args = ((logits, *kept),)
        for i, layer in enumerate(self.caches):
            for node, kind in zip(self.inputs[3 + 2 * i : 5 + 2 * i], ("key", "value"), strict=True):
                if layer is not None:
                    node.target = f"{kind}_pages_{i}"
                    node._rename(node.target)
        self.transforms()
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.cast()
        graph_tools.delete_unused_tensors(self.gm)
        for node in self.graph.nodes:
            if node.target in QUANTIZED and node.name not in self.reasons and node.op == "call_function":
                self.reasons[node.name] = leftover(node)
        self.graph.lint()
        self.gm.recompile()

    def transforms(self) -> None:
        """Hadamard transforms that stay in torch."""
        for node in list(self.graph.find_nodes(op="call_function", target=ops.hadamard)):
            x, transpose, sizes = (*node.args, False, None)[:3] if len(node.args) < 3 else node.args
            with self.graph.inserting_before(node):
                new = self.emit(triton_ops.hadamard.default, (x, bool(transpose), list(sizes or ())), node)
            node.replace_all_uses_with(new)

    def cast(self) -> None:
        """Float tensors that torch operators read, in the model's type."""
        if self.dtype == torch.float32:
            return
        for node in self.graph.find_nodes(op="get_attr"):
            value = graph_tools.get_tensor(self.gm, node)
            torch_reads = any(user.target in TORCH_READERS for user in node.users)
            if value.is_floating_point() and torch_reads:
                graph_tools.set_tensor(self.gm, str(node.target), value.to(self.dtype))
