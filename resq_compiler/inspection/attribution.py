"""Which sites cost the accuracy: quantize one kind, one block or one linear at a time and see how far the logits move.

The compiled graph is run with switches: a linear part uses its codes or its float weight (from compile's on_float graph), and its
input is quantized or not; a cache quantizer works or passes its input on. With all off it is the float model; what is on is all
that differs. A block's run starts from the float model's values before that block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.errors import PassError
from resq_compiler.inspection.noise import input_of, quantizer_of
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import node_arg
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.views import CodedLinear, Dequantize, Linear

LEVELS = ("kind", "block", "linear")
Switch = tuple[str, str]  # ("weights" | "activations" | "kv", name of the linear or of the cache quantizer)


@dataclass(frozen=True)
class Cost:
    """What quantizing `name` alone does: kl in nats per token from the float model, and perplexity against the float one's."""

    level: str
    name: str
    kl: float
    perplexity: float
    increase: float  # of perplexity, relative


@dataclass(frozen=True)
class Costs:
    """Costs, and the number of tokens they were measured on."""

    tokens: int
    costs: list[Cost]


@torch.no_grad()
def attribute(
    quantized: GraphModule, projected: GraphModule, ids: Tensor, levels: Iterable[str] = ("kind", "block"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:  # fmt: skip
    """Cost of every kind, block or linear, costliest first within each level.

    Args:    quantized: the compiled graph. projected: the float graph of the same compile (compile's on_float).
             ids: [n, length] int64, evaluated in one batch. levels: out of kind, block, linear.
    Raises:  PassError: the two graphs are not of one compile.
    """
    runner = SwitchedGraph(quantized, projected, ids)
    jobs = [(level, name, on) for level in levels for name, on in runner.groups(level).items()]
    costs = []
    for i, (level, name, on) in enumerate(jobs):
        progress(i, len(jobs))
        costs.append(runner.cost(level, name, on))
    progress(len(jobs), len(jobs))
    return sorted(costs, key=lambda c: (LEVELS.index(c.level), -c.kl))


class SwitchedGraph:
    """A compiled graph whose quantizers can be switched on one by one."""

    def __init__(self, quantized: GraphModule, projected: GraphModule, ids: Tensor):
        self.gm, self.ids = quantized, ids
        self.weights = float_weights(quantized, projected)
        self.logits = graph_tools.output_args(quantized.graph)[0]
        self.switches = list(dict.fromkeys(s for n in quantized.graph.nodes for s in self._switches(n)))
        self.blocks = {s: b for n in quantized.graph.nodes for s in self._switches(n) for b in [block_of(n)]}
        schedule = executor.Schedule(quantized, [self.logits], graph_tools.placeholders(quantized.graph))
        self.order = schedule.order
        self.first = {s: i for i, n in reversed(list(enumerate(self.order))) for s in self._switches(n)}
        self.starts = sorted({self._start_of(b) for b in set(self.blocks.values())})
        self.saved: dict[int, dict[Node, Any]] = {}
        self.float_log_p = self._log_p(frozenset(), keep=True)

    def _switches(self, node: Node) -> list[Switch]:
        part, site = meta.get(node, meta.LinearPart), meta.get(node, meta.QuantizerSite)
        if part is not None:
            kinds = ["weights"] * (CodedLinear.of(node) is not None) + ["activations"] * (
                quantizer_of(node) is not None
            )
            return [(kind, part.site.name) for kind in kinds]
        return [("kv", site.name)] if site is not None and site.kind == "kv" else []

    def _start_of(self, block: int | None) -> int:
        """Index of the first node that a switch of a block changes."""
        return min(self.first[s] for s, b in self.blocks.items() if b == block and s in self.first)

    def groups(self, level: str) -> dict[str, frozenset[Switch]]:
        """What is switched on together at a level."""
        groups: dict[str, set[Switch]] = {}
        for switch in self.switches:
            kind, name = switch
            block = self.blocks[switch]
            label = {"kind": kind, "block": "lm_head" if block is None else f"block {block}", "linear": name}[level]
            if level != "linear" or kind != "kv":
                groups.setdefault(label, set()).add(switch)
        named = {name: frozenset(on) for name, on in groups.items()}
        return {**named, "everything": frozenset(self.switches)} if level == "kind" else named

    def cost(self, level: str, name: str, on: frozenset[Switch]) -> Cost:
        """Distance from the float model with some switches on."""
        log_p = self._log_p(on)
        kl = (self.float_log_p.exp() * (self.float_log_p - log_p)).sum(-1).mean()
        before, after = self._nll(self.float_log_p), self._nll(log_p)
        return Cost(level, name, max(0.0, float(kl)), math.exp(after), math.exp(after - before) - 1)

    def _nll(self, log_p: Tensor) -> float:
        return -float(log_p[:, :-1].gather(-1, self.ids[:, 1:, None]).double().mean())

    def _log_p(self, on: frozenset[Switch], keep: bool = False) -> Tensor:
        """Log probabilities [n, length, vocabulary]; a run starts where the first switch that is on has an effect."""
        begin = max((i for i in self.saved if i <= min(self.first[s] for s in on)), default=0) if on else 0
        env = dict(self.saved[begin]) if begin in self.saved else executor.first_tokens(self.gm, self.ids)
        release = executor.last_uses(self.order, keep={self.logits})
        for i, node in enumerate(self.order[begin:], begin):
            if keep and i in self.starts:
                self.saved[i] = {n: v for n, v in env.items() if n.op != "get_attr"}
            if node not in env:
                env[node] = self._value(node, env, on)
            for dead in release.get(node, ()):
                env.pop(dead, None)
        return env[self.logits].float().log_softmax(-1)

    def _value(self, node: Node, env: dict[Node, Any], on: frozenset[Switch]) -> Any:
        for source in node.all_input_nodes:  # tensors are not kept between runs
            if source.op == "get_attr" and source not in env:
                env[source] = graph_tools.get_tensor(self.gm, source)
        if meta.get(node, meta.LinearPart) is not None:
            return self._linear(node, env, on)
        site, image = meta.get(node, meta.QuantizerSite), Dequantize.of(node)
        if site is not None and (site.kind == "activation" or ("kv", site.name) not in on):
            return env[node_arg(node, "x")]
        if image is not None:
            return env[image.codes]
        return graph_tools.run_node(self.gm, node, env)

    def _linear(self, node: Node, env: dict[Node, Any], on: frozenset[Switch]) -> Tensor:
        part = meta.get(node, meta.LinearPart)
        assert part is not None
        x, quantizer, coded = env[input_of(node)], quantizer_of(node), CodedLinear.of(node)
        if quantizer is not None and ("activations", part.site.name) in on:
            x = ops.dequantize(quantizer.codes_of(self.gm, x))
        weight = (
            Linear.require(node).weight_tensor(self.gm) if coded is None else self.weights[part.site.name, part.index]
        )
        indices = (Linear.require(node) if coded is None else coded).indices
        if coded is None or ("weights", part.site.name) not in on:
            return F.linear(x, weight) if indices is None else ops.expert_linear(x, weight, env[indices])
        if indices is None:
            return ops.weight_only_linear(x, env[coded.qdata], env[coded.scale], coded.group_size)
        return ops.weight_only_expert_linear(x, env[coded.qdata], env[coded.scale], env[indices], coded.group_size)


def block_of(node: Node) -> int | None:
    """The block of a part or a cache quantizer; None for lm_head."""
    part, site = meta.get(node, meta.LinearPart), meta.get(node, meta.QuantizerSite)
    return part.site.block if part is not None else site.block if site is not None else None


def coded_parts(gm: GraphModule) -> Iterator[tuple[CodedLinear, meta.LinearPart]]:
    """The parts of linears whose weights are codes, in execution order."""
    for node in gm.graph.nodes:
        part, coded = meta.get(node, meta.LinearPart), CodedLinear.of(node)
        if part is not None and coded is not None:
            yield coded, part


def float_weights(quantized: GraphModule, projected: GraphModule) -> dict[tuple[str, int], Tensor]:
    """Float weights of all parts, by linear and part. Raises PassError unless every quantized part has one of its shape."""
    found: dict[tuple[str, int], Tensor] = {}
    for node in projected.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is not None and is_call(node, *Linear.targets):
            found[part.site.name, part.index] = Linear.require(node).weight_tensor(projected)
    for coded, part in coded_parts(quantized):
        weight, codes = found.get((part.site.name, part.index)), coded.codes(quantized)
        if weight is None or weight.shape != codes.shape:
            raise PassError(
                f"attribution: node {coded.node.name}: {part.site.name} part {part.index} has codes {list(codes.shape)} and float weight "
                f"{None if weight is None else list(weight.shape)}; give the graph that compile(on_float=...) reported",
                node=coded.node.name,
            )
    return found
