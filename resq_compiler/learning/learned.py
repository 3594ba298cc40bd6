"""What is being learned of a graph, and which tensors of the model it changes.

A learned transform starts as the identity between the weights that write a value and those that read it. While learning, the weights are
taken through it, differentiably; afterwards it is multiplied into them in float64 and nothing of it is left.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from resq_compiler.calibration import precision
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.args import set_argument
from resq_compiler.ir.views import Dequantize, Embedding, Norm, Quantize, QuantizeDequantize
from resq_compiler.learning.clipped_weights import ClippedWeights
from resq_compiler.learning.learned_codes import LearnedCodes
from resq_compiler.learning.running import Resident, Run
from resq_compiler.numerics.transforms import HeadRotation, Learnable, Rotation, Scaling, Transform
from resq_compiler.util import devices

LEAST_CLIP = 0.3


@dataclass(frozen=True)
class Change:
    """What a learned transform does to one tensor."""

    learned: str
    apply: Callable[[Transform, Tensor], Tensor]


class Learned(nn.Module):
    """Learned transforms by name, the tensors that they change, and learned clips of quantizers.

    weights: scales of codes that are made of float weights, learned too. codes: codes, learned too. norms: whose values transforms scale.
    embeddings: whose rows they change; these are looked up first while learning, because tables are large.

    One step: `begin`, any number of runs and backward passes, `end`. Between them the transforms are leaves, so that every block may run
    backward on its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transforms = nn.ModuleDict()
        self.shares = nn.ParameterDict()
        self.changes: dict[str, list[Change]] = {}
        self.late: dict[str, list[Change]] = {}
        self.undone: dict[Node, str] = {}
        self.norms: dict[Node, str] = {}
        self.embeddings: dict[Node, str] = {}
        self.quantizers: dict[Node, str] = {}
        self.weights: ClippedWeights | None = None
        self.codes: LearnedCodes | None = None
        self._resident = Resident()
        self._made: dict[str, Transform] = {}
        self._leaves: dict[str, Transform] = {}

    def add(self, name: str, learnable: Learnable) -> None:
        """A transform to learn."""
        self.transforms[name] = learnable

    def change(self, target: str, learned: str, apply: Callable[[Transform, Tensor], Tensor]) -> None:
        """Let a tensor of the model go through a transform."""
        self.changes.setdefault(target, []).append(Change(learned, apply))

    def undo(self, node: Node, target: str, learned: str, apply: Callable[[Transform, Tensor], Tensor]) -> None:
        """While learning, let a value go back through a transform, because the tensor that reads it is large: it is changed at the end."""
        self.undone[node] = learned
        self.late.setdefault(target, []).append(Change(learned, apply))

    def add_clip(self, node: Node, name: str, clip: float) -> None:
        """Learn the share of its range that a quantizer covers; quantizers of one name have one in common."""
        if name not in self.shares:
            self.shares[name] = nn.Parameter(torch.tensor(float(clip)))
        self.quantizers[node] = name

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, what is learned, and what is read again and again, lie on the device that computes; behind it, with the model again."""
        move(self, devices.current() or devices.CPU)
        try:
            yield
        finally:
            self._resident.clear()
            self._made, self._leaves = {}, {}
            move(self, devices.CPU)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not any(True for _ in self.parameters())

    def begin(self) -> None:
        """Take the transforms of the parameters as they are now."""
        if self.codes is not None:
            self.codes.begin()
        with torch.enable_grad():
            self._made = {name: transform_of(module) for name, module in self.transforms.items()}
        self._leaves = {name: leaf_of(transform) for name, transform in self._made.items()}

    def end(self) -> None:
        """Pass the gradients on to the parameters."""
        made, gradients = [], []
        for name, transform in self._made.items():
            (leaf,) = self._leaves[name].tensors.values()
            if leaf.grad is not None:
                made.append(next(iter(transform.tensors.values())))
                gradients.append(leaf.grad)
        if made:
            torch.autograd.backward(made, gradients)

    def run(self, gm: GraphModule) -> Run:
        """How to run the graph with what was learned so far."""
        behind = {node: self._behind(name) for node, name in (self.norms | self.embeddings).items()}
        behind |= {node: self._back(name) for node, name in self.undone.items()}
        clips = {node: self.shares[name].clamp(LEAST_CLIP, 1.0) for node, name in self.quantizers.items()}
        return Run(gm, tensor=self.tensor, behind=behind, clips=clips)

    def _behind(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: self._leaves[name].forward(value)

    def _back(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: self._leaves[name].inverse(value)

    def tensor(self, target: str, value: Tensor) -> Tensor:
        """A tensor of the model, changed; in the dtype that linears round it to anyway, unless codes are made of it."""
        if self.codes is not None and target in self.codes.names:
            return self.codes.tensor(target, value)
        changes, value = self.changes.get(target, ()), self._resident(target, value)
        if changes and self.weights is None and precision.dtype() != torch.float32:
            value = value.to(precision.dtype())
        for change in changes:
            value = change.apply(self._leaves[change.learned], value)
        return value if self.weights is None else self.weights.tensor(target, value)

    @torch.no_grad()
    def write(self, gm: GraphModule, made_by: str) -> None:
        """Put what was learned into the graph: weights, codes, gains of norms, clips."""
        exact = {name: exactly(transform_of(module)) for name, module in self.transforms.items()}
        nodes = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
        for target, changes in (self.changes | self.late).items():
            graph_tools.change_tensor(gm, nodes[target], functools.partial(changed, changes=changes, exact=exact))
        for node, name in self.embeddings.items():
            Embedding.require(node).change_rows(gm, exact[name].forward)
        for node, name in self.norms.items():
            write_gain(gm, node, exact[name], made_by)
        for node, name in self.quantizers.items():
            set_argument(node, "clip", round(float(self.shares[name].clamp(LEAST_CLIP, 1.0)), 6))
        if self.codes is not None:
            self.codes.write(gm)


@torch.no_grad()
def move(module: nn.Module, device: torch.device) -> None:
    """Put parameters and buffers on a device. Not `Module.to`, which writes into parameters that others may hold."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.device != device:
                part.register_parameter(name, nn.Parameter(parameter.detach().to(device), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to(device))


def changed(value: Tensor, changes: list[Change], exact: Mapping[str, Transform]) -> Tensor:
    """A tensor of the model behind all that was learned for it, rounded once."""
    wide = value.double()
    for change in changes:
        wide = change.apply(exact[change.learned], wide)
    return wide.to(value.dtype).contiguous()


def transform_of(module: nn.Module) -> Transform:
    """The transform that a learnable stands for."""
    assert isinstance(module, Learnable)
    return module.transform()


def leaf_of(transform: Transform) -> Transform:
    """The same transform, cut off from how it was made, so that gradients stop and add up there."""
    (tensor,) = transform.tensors.values()
    kind: Any = type(transform)
    return kind(tensor.detach().requires_grad_())


def exactly(transform: Transform) -> Transform:
    """In float64; rotations as orthogonal as float64 is: the nearest ones."""
    if isinstance(transform, Rotation):
        return Rotation(nearest_orthogonal(transform.u.detach().double()))
    if isinstance(transform, HeadRotation):
        return HeadRotation(torch.stack([nearest_orthogonal(u) for u in transform.u.detach().double()]))
    assert isinstance(transform, Scaling)
    return Scaling(transform.s.detach().double())


def nearest_orthogonal(u: Tensor) -> Tensor:
    """The orthogonal matrix nearest to U: the unitary factor of its polar decomposition."""
    left, _, right = torch.linalg.svd(u)
    return left @ right


def write_gain(gm: GraphModule, node: Node, scaling: Transform, made_by: str) -> None:
    """Multiply the gain of a norm, or give it one; under a name of its own, because norms may share a tensor."""
    norm = Norm.require(node)
    width = scaling.width
    like = next(iter(gm.buffers()))
    for argument, tensor in (("weight", norm.gain), ("bias", norm.bias)):
        if tensor is None and argument == "bias":
            continue
        before = torch.ones(width, device=like.device) if tensor is None else graph_tools.get_tensor(gm, tensor)
        changed = scaling.forward(before.double()).to(before.dtype)
        name = f"resq.{node.name}.learned_{argument}"
        if tensor is not None and str(tensor.target) == name:
            graph_tools.set_tensor(gm, name, changed)
        else:
            set_argument(node, argument, graph_tools.add_tensor(gm, name, changed, made_by))


def may_learn_clip(node: Node) -> float | None:
    """The clip of a quantizer below 8 bits with dynamic ranges, but of heads before output projections; None for any other node."""
    quantizer = Quantize.of(node)
    if quantizer is not None and quantizer.bits < 8 and quantizer.scale is None and not _cuts_heads(quantizer):
        return quantizer.clip
    cache = QuantizeDequantize.of(node)
    return cache.clip if cache is not None and min(bits for bits, _, _ in cache.parts) < 8 else None


def _cuts_heads(quantizer: Quantize) -> bool:
    """Their groups are narrow, and operators of attention quantize all parts with one clip."""
    images = [user for user in quantizer.node.users if Dequantize.of(user) is not None]
    facts = (meta.get(r, meta.LinearPart) for user in (quantizer.node, *images) for r in user.users)
    return quantizer.groups > 1 and any(fact is not None and fact.site.role == "o" for fact in facts)
