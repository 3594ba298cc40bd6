"""What a compile will need, by its shapes alone: memory, disk and time of each of its steps, for one process of several.

Memory is that of tensors whose sizes follow from shapes; libraries, and what the allocator holds back, come on top (`BASE`). A step needs
what is kept over all steps and what it has at work, and steps follow each other, so a compile needs what its largest step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from resq_compiler.analysis import sensitivity
from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.calibration import executor
from resq_compiler.calibration.aside import SHARE
from resq_compiler.calibration.executor import TOKENS_PER_BATCH
from resq_compiler.inspection.rates import Rates
from resq_compiler.ir import graph_tools, promises, values
from resq_compiler.ir.views import Embedding, Linear
from resq_compiler.numerics.float64 import PIECE
from resq_compiler.passes import AllocateBits, ComputeBases, FuseProjections, QuantizeWeights
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.util.memory import LARGE_MODEL
from resq_compiler.util.text import megabytes

FLOAT, DOUBLE = 4, 8
BASE = 500 * 10**6
"""Bytes of PyTorch and transformers in memory."""
MOMENT, ROUNDED_MOMENT = 10, 6
"""Bytes for each entry of the moment of a group, whose memory its factor is made in: its float64 sum, and half of a float32 one. Of
products in bfloat16, which one process adds up, both are float32."""
ROWS = 4
"""Of the weights of a group in float32, at a time: stacked, by columns, errors, codes and their search."""


@dataclass(frozen=True)
class Group:
    """Linears that read one value: `rows` of all of them together, `columns`; of so many experts, of which a token goes through some."""

    rows: int
    columns: int
    experts: int = 1
    choices: int = 1

    @property
    def weights(self) -> int:
        """Of all experts."""
        return self.rows * self.columns * self.experts


@dataclass(frozen=True)
class Shapes:
    """Of a decoder: the groups of linears of each block, the width of the stream, the vocabulary, heads of attention, and all weights.

    fusable: one basis for the whole stream. beside: numbers a token that lead from block to block beside the stream, at most; tables:
    weights of lookups that do not write into it.
    """

    blocks: tuple[tuple[Group, ...], ...]
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    all_weights: int
    fusable: bool
    beside: int = 0
    tables: int = 0

    @property
    def linears(self) -> int:
        """Weights of the linears in blocks."""
        return sum(group.weights for block in self.blocks for group in block)

    @property
    def largest_block(self) -> int:
        """Weights of the largest block."""
        return max(sum(group.weights for group in block) for block in self.blocks)

    @property
    def groups(self) -> list[Group]:
        """Of all blocks."""
        return [group for block in self.blocks for group in block]

    @classmethod
    def of(cls, gm: GraphModule, topology: Topology) -> Shapes:
        """Those of a graph whose topology was found."""
        attention = topology.blocks[0].attention
        tensors = [graph_tools.held(gm, node) for node in _tensor_nodes(gm)]
        return cls(
            tuple(tuple(_groups(gm, topology, block)) for block in topology.blocks), topology.hidden_size,
            values.width(topology.head), attention.num_heads, attention.value_heads, max(attention.head_dim, attention.value_dim),
            sum(t.numel() for t in tensors), topology.residual.fusable, _beside(gm, topology), _other_tables(gm, topology),
        )  # fmt: skip


def _beside(gm: GraphModule, topology: Topology) -> int:
    borders = ([block.end, *executor.carried(gm, block.end)] for block in topology.blocks)
    return max(map(executor.numbers_a_token, borders)) - topology.hidden_size


def _other_tables(gm: GraphModule, topology: Topology) -> int:
    lookups = set(executor.lookups(gm)) - set(topology.residual.writers)
    return sum(graph_tools.held(gm, Embedding.require(node).table).numel() for node in lookups)


def _tensor_nodes(gm: GraphModule) -> list[Node]:
    """One node for each tensor."""
    return list({str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}.values())


def _groups(gm: GraphModule, topology: Topology, block: Block) -> Iterator[Group]:
    """The linears of a block by what they read."""
    a = block.attention
    counts = {f.down: f.experts for f in block.feed_forwards} | {
        n: f.experts for f in block.feed_forwards for n in (*f.gates, *f.ups)
    }
    inside = [*a.linears.values(), *counts]
    found: dict[Node, list[Node]] = {}
    for node in (n for n in topology.linears if n in inside):
        found.setdefault(Linear.require(node).x, []).append(node)
    for nodes in found.values():
        shapes = [Linear.require(node).weight_shape(gm) for node in nodes]
        experts = counts.get(nodes[0])
        choices = 1 if experts is None else experts.choices
        yield Group(sum(s[-2] for s in shapes), shapes[0][-1], 1 if experts is None else experts.count, choices)


@dataclass(frozen=True)
class Step:
    """memory: bytes at work, by what they are; disk: bytes it writes; seconds: None where nothing was measured; sent: bytes to others."""

    name: str
    memory: dict[str, int]
    disk: int = 0
    seconds: float | None = None
    sent: int = 0

    @property
    def bytes(self) -> int:
        """At work, all together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Forecast:
    """kept: bytes that are there from the first step to the last, by what they are. aside: bytes in files until all is done."""

    steps: tuple[Step, ...]
    kept: dict[str, int]
    processes: int = 1
    aside: int = 0

    @property
    def largest(self) -> Step:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.bytes)

    @property
    def memory(self) -> int:
        """Bytes of one process, at its peak."""
        return BASE + sum(self.kept.values()) + self.largest.bytes

    @property
    def hidden(self) -> int:
        """Bytes of hidden states between two blocks, of the step that has most."""
        return max(map(_hidden, self.steps))

    @property
    def disk(self) -> int:
        """Bytes of the compiled model."""
        return sum(step.disk for step in self.steps)

    @property
    def seconds(self) -> float | None:
        """Of all steps."""
        each = [step.seconds for step in self.steps]
        return None if any(s is None for s in each) else sum(s for s in each if s is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        steps = [{**asdict(step), "bytes": step.bytes} for step in self.steps]
        whole = {"memory": self.memory, "disk": self.disk, "aside": self.aside, "seconds": self.seconds}
        return {"processes": self.processes, **whole, "kept": self.kept, "steps": steps}


def _hidden(step: Step) -> int:
    return step.memory.get("hidden states", 0)


def forecast(
    shapes: Shapes, config: CompileConfig, passes: Sequence[Pass], rates: Rates | None = None, processes: int = 1
) -> Forecast:
    """What each step of a compile needs in each of several processes."""
    plan = _Plan(shapes, config, rates, processes)
    steps = [plan.opening()]
    if any(item.needs_calibration for item in passes if isinstance(item, ComputeBases)):
        steps += [plan.calibrating(), plan.bases()]
    if any(item.needs_calibration for item in passes if isinstance(item, AllocateBits)):
        steps.append(plan.sensitivities())
    quantizer = next((item for item in passes if isinstance(item, QuantizeWeights)), None)
    if quantizer is not None:
        steps.append(plan.quantizing(quantizer, any(isinstance(item, FuseProjections) for item in passes)))
    return Forecast((*steps, plan.writing()), plan.kept(), processes, plan.aside())


@dataclass(frozen=True)
class _Plan:
    shapes: Shapes
    config: CompileConfig
    rates: Rates | None
    processes: int

    @property
    def embedding(self) -> int:
        """Bytes of the table."""
        return FLOAT * self.shapes.vocabulary * self.shapes.hidden

    @property
    def table(self) -> int:
        """Bytes of the embedding, or of lm_head, that are made at a time: a large one piece by piece, in float64 where it is rotated."""
        piece = (FLOAT + 2 * DOUBLE) * min(promises.ROWS * self.shapes.hidden, PIECE // FLOAT)
        return piece if self.embedding >= promises.TABLE else 2 * self.embedding

    @property
    def moments(self) -> int:
        """Bytes of the second moments: of the stream, and of values, keys and queries of every head."""
        s = self.shapes
        streams = 1 if s.fusable else 2 * len(s.blocks)
        return DOUBLE * (streams * s.hidden**2 + 3 * len(s.blocks) * s.kv_heads * s.head_dim**2)

    @property
    def is_large(self) -> bool:
        """Whether codes of finished blocks wait in files."""
        return FLOAT * self.shapes.all_weights >= LARGE_MODEL

    def aside(self) -> int:
        """Codes of finished blocks, as a byte each, and float embeddings, in the work directory or a temporary one."""
        return self.shapes.linears + 2 * self.embedding + FLOAT * self.shapes.tables if self.is_large else 0

    def kept(self) -> dict[str, int]:
        """Bases, and codes of finished blocks as a byte each until they are written; those of a large model wait in files."""
        return {
            "bases": self.moments,
            "codes": 0 if self.is_large or self.config.weight_bits >= 16 else self.shapes.linears,
        }

    def opening(self) -> Step:
        """Reads every weight once, for its digest."""
        size = FLOAT * self.shapes.all_weights
        largest = max(self.table, *(FLOAT * group.weights for group in self.shapes.groups))
        return Step("open and check", {"largest tensor": largest}, seconds=self._time(lambda r: size / r.digest))

    def calibrating(self) -> Step:
        """All windows of bases through one block after the other."""
        samples = min(self.config.basis_samples, self.config.calibration_samples)
        tokens, s = self._tokens(samples), self.shapes
        work = tokens * (self._forward() + 2 * len(s.blocks) * s.hidden**2)
        return Step(
            "calibrate",
            {"weights of a block": FLOAT * s.largest_block, **self._running(tokens), "second moments": self.moments},
            seconds=self._time(lambda r: work / r.products), sent=self._sent(self.moments),
        )  # fmt: skip

    def bases(self) -> Step:
        """Eigenvectors, of the stream and of heads."""
        s = self.shapes
        streams = 1 if s.fusable else 2 * len(s.blocks)
        cubes = streams * s.hidden**3 + 2 * len(s.blocks) * s.kv_heads * s.head_dim**3
        return Step(
            "bases", {"eigenvectors": 3 * DOUBLE * s.hidden**2, "weights of a block": 2 * FLOAT * s.largest_block, "table": self.table},
            seconds=self._time(lambda r: cubes * r.eigen),
        )  # fmt: skip

    def sensitivities(self) -> Step:
        """Predictions of a few windows, and a backward pass block by block, of one window at a time inside a block."""
        s, length = self.shapes, min(sensitivity.LENGTH, self.config.calibration_length)
        widest = max(group.columns * group.choices for group in s.groups)
        windows = min(max(1, sensitivity.TOKENS // length), self.config.calibration_samples)
        memory = {
            "weights of a block": FLOAT * s.largest_block,
            "values of a block": FLOAT * length * (3 * widest + 8 * s.hidden + 2 * s.heads * length),
            "hidden states": self._kept_as * windows * length * (s.hidden + s.beside) * (len(s.blocks) + 1),
            "logits": 6 * FLOAT * length * s.vocabulary,
        }
        return Step(
            "sensitivities", memory, seconds=self._time(lambda r: 4 * windows * length * self._forward() / r.products)
        )

    def quantizing(self, item: QuantizeWeights, turned: bool) -> Step:
        """Codes of one block after the other. turned: weights are multiplied with bases, in float64, in every process."""
        s, tokens = self.shapes, self._tokens(self.config.calibration_samples)
        products = sum(2 * group.weights * s.hidden for group in s.groups) if turned else 0
        memory = {"weights of a block": FLOAT * s.largest_block}
        if not item.by_block:
            memory["rows at work"] = max(FLOAT * ROWS * group.weights // group.experts for group in s.groups)
            return Step(
                "round",
                memory,
                seconds=self._time(lambda r: products / r.doubles + s.linears * r.search / self.processes),
            )
        rounded = self.config.calibration_dtype == "bfloat16" and self.processes == 1
        moment = (ROUNDED_MOMENT if rounded else MOMENT) * max(group.columns for group in s.groups) ** 2
        memory |= {**self._running(tokens), "Hessian": moment}
        memory["rows at work"] = max(FLOAT * ROWS * group.rows * group.columns for group in s.groups)
        return Step("GPTQ" if item.method == "gptq" else "round by output", memory, seconds=self._time(self._gptq(tokens, products)),
                    sent=self._sent(sum(DOUBLE * g.columns**2 * g.experts for g in s.groups) + s.linears))  # fmt: skip

    def _gptq(self, tokens: int, products: int) -> Callable[[Rates], float]:
        s = self.shapes

        def seconds(r: Rates) -> float:
            moments = sum(tokens * g.choices * g.columns**2 for g in s.groups)
            run = (tokens * self._forward() + moments) / r.products
            factors = sum(g.experts * g.columns**3 for g in s.groups) * r.factor
            spread = sum(g.weights * g.columns for g in s.groups) / r.products
            return run + products / r.doubles + factors + (s.linears * (r.search + r.columns) + spread) / self.processes

        return seconds

    def writing(self) -> Step:
        """The compiled model: packed codes, scales, and float embeddings."""
        size = compiled_bytes(self.shapes.linears, self.shapes.all_weights, self.config)
        return Step("write", {"embeddings": self.table}, disk=size, seconds=self._time(lambda r: size / r.digest))

    def _tokens(self, samples: int) -> int:
        """Of the windows of one process."""
        return -(-samples // self.processes) * self.config.calibration_length

    def _running(self, tokens: int) -> dict[str, int]:
        """Hidden states between two blocks, and what one batch has at work inside one."""
        s, length = self.shapes, self.config.calibration_length
        batch = max(TOKENS_PER_BATCH, length)
        widest = max(group.columns * group.choices for group in s.groups)
        inside = batch * (3 * widest + 4 * s.hidden + 2 * s.heads * length)
        return {"hidden states": self._kept_as * tokens * (s.hidden + s.beside), "a batch": FLOAT * inside}

    @property
    def _kept_as(self) -> int:
        """Bytes of a number between two blocks."""
        return FLOAT if self.config.hidden_dtype == "float32" else FLOAT // 2

    def _forward(self) -> int:
        """Additions and multiplications for a token."""
        s = self.shapes
        linears = sum(2 * g.rows * g.columns * g.choices for g in s.groups)
        return linears + 4 * len(s.blocks) * s.heads * s.head_dim * self.config.calibration_length

    def _sent(self, size: int) -> int:
        return size if self.processes > 1 else 0

    def _time(self, seconds: Callable[[Rates], float]) -> float | None:
        return None if self.rates is None else seconds(self.rates)


TRUSTED = 0.8
"""A compile is refused where so much of its forecast is more than there is: forecasts are within a fifth (docs/scaling.md)."""


def in_memory(found: Forecast, free_memory: int) -> Forecast:
    """The same without hidden states that will lie in files where so many bytes are free: those of a large model, which has a directory."""
    if not found.aside:
        return found
    steps = [
        replace(step, memory={k: v for k, v in step.memory.items() if k != "hidden states" or v <= SHARE * free_memory})
        for step in found.steps
    ]
    moved = found.hidden if found.hidden > SHARE * free_memory else 0
    return replace(found, steps=tuple(steps), aside=found.aside + moved)


def check_fits(found: Forecast, free_memory: int | None, free_device: int | None = None) -> str | None:
    """What stands in the way of a compile that has these bytes of memory, and of that of a GPU; None where it fits, or where they are
    not known."""
    found = found if free_memory is None else in_memory(found, free_memory)
    if free_memory is not None and TRUSTED * found.memory > free_memory:
        step = found.largest
        parts = {**found.kept, **step.memory}
        shown = ", ".join(f"{name} {megabytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:4])
        return (
            f"memory: step `{step.name}` of this compile needs about {megabytes(found.memory)} ({shown}), and {megabytes(free_memory)} are "
            f"free here; {_advice(step)}"
        )
    if free_device is not None and TRUSTED * found.largest.bytes > free_device:
        return (
            f"memory of the device: step `{found.largest.name}` of this compile needs about {megabytes(found.largest.bytes)} there, and "
            f"{megabytes(free_device)} are free; {_advice(found.largest)}"
        )
    return None


def disk_problem(size: int, free: int | None, where: str, what: str = "the compiled model") -> str | None:
    """What stands in the way of writing so many bytes; None where they fit, or where nothing is known of the disk."""
    if free is None or size <= free:
        return None
    return (
        f"disk: {what} will have about {megabytes(size)}, and {megabytes(free)} are free in {where}; make room, or name "
        "another directory"
    )


def compiled_bytes(linears: int, weights: int, config: CompileConfig) -> int:
    """Bytes on disk of a compiled model, about: packed codes of the weights of linears, all other weights as float32."""
    if config.model_megabytes is not None:
        return round(config.model_megabytes * 10**6)
    high = config.high_fraction if config.weight_bits < config.high_bits else 0.0
    bits = config.weight_bits * (1 - high) + config.high_bits * high if config.weight_bits < 16 else 32.0
    bits = bits if config.average_bits is None else config.average_bits
    return round(linears * bits / 8) + FLOAT * (weights - linears)


def _advice(step: Step) -> str:
    """What makes the largest part of a step smaller."""
    part = max(step.memory, key=step.memory.__getitem__)
    if step.name == "sensitivities":
        return "equal shares of columns (allocation=equal, no average_bits or model_megabytes) need none of this"
    if part == "hidden states":
        return (
            "ask for fewer or shorter calibration windows (calibration_samples, calibration_length), hidden_dtype=bfloat16, or share them "
            "among processes"
        )
    if part in ("Hessian", "rows at work"):
        return "weights rounded without GPTQ (weight_method=rtn) need less, or take a machine with more memory"
    if part == "a batch":
        return "ask for shorter calibration windows (calibration_length)"
    return "take a machine with more memory"
