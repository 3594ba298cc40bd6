"""One graph, three ways to run it: quantized with gradients, float, and as it is.

A `Run` calls the operators of the graph, but for quantizers and for linears on codes, whose differentiable forms it calls instead; and it
reads tensors of the model through what is being learned. Nothing of a model is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor, precision
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.views import CodedLinear, Dequantize, Quantize, QuantizeDequantize
from resq_compiler.learning import straight_through as ste
from resq_compiler.util import devices


class Resident:
    """Tensors of the model on the device that computes now, where they stay while there is plenty of room: windows read all of them."""

    def __init__(self) -> None:
        self._there: dict[str, Tensor] = {}

    def __call__(self, target: str, value: Tensor) -> Tensor:
        """The tensor as it is."""
        device = devices.current()
        if device is None:
            return value
        if target not in self._there:
            value = devices.here(value)
            if value.nbytes > (devices.free_memory(device) or 0) / 4:
                return value
            self._there[target] = value
        return self._there[target]

    def clear(self) -> None:
        """Let all of them go."""
        self._there.clear()


@dataclass
class Run:
    """How to run nodes.

    quantized: with quantizers; else values pass them, which is the float model as long as weights are float. tensor: from the name and
    value of a tensor of the model to what is to be taken for it. behind: what to do to the values of some nodes. clips: shares of the
    range of quantizers, in place of those of the graph. substitutes: operators to call in the place of others, by default linears in the
    dtype of calibration.
    """

    gm: GraphModule
    quantized: bool = True
    tensor: Callable[[str, Tensor], Tensor] = field(default_factory=Resident)
    behind: Mapping[Node, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    clips: Mapping[Node, Tensor] = field(default_factory=dict)
    substitutes: Mapping[object, Callable[..., Tensor]] = field(default_factory=precision.substitutes)

    def node(self, node: Node, env: Mapping[Node, Any]) -> Any:
        """The value of one node."""
        value = self._value(node, env)
        return self.behind[node](value) if node in self.behind else value

    def _value(self, node: Node, env: Mapping[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.tensor(str(node.target), graph_tools.get_tensor(self.gm, node))
        if (quantizer := Quantize.of(node)) is not None:
            return self._image(quantizer, env)
        if (cache := QuantizeDequantize.of(node)) is not None:
            x = env[cache.x]
            return ste.cache_image(x, cache.parts, self.clips.get(node, cache.clip)) if self.quantized else x
        if (image := Dequantize.of(node)) is not None:
            return env[image.codes]
        if (coded := CodedLinear.of(node)) is not None:
            return self._coded(coded, env)
        return executor.run_node(self.gm, node, env, self.substitutes)

    def _coded(self, coded: CodedLinear, env: Mapping[Node, Any]) -> Tensor:
        """A linear on codes that were made float again."""
        linear = self.substitutes.get(ops.weight_only_linear, ste.linear_of_codes)
        return linear(env[coded.x], env[coded.qdata], env[coded.scale], coded.group_size)

    def _image(self, quantizer: Quantize, env: Mapping[Node, Any]) -> Tensor:
        x: Tensor = env[quantizer.x]
        if not self.quantized:
            return x
        if quantizer.scale is not None and quantizer.zero_point is not None:
            return ste.static_image(x, quantizer.bits, env[quantizer.scale], env[quantizer.zero_point])
        clip = self.clips.get(quantizer.node, quantizer.clip)
        return ste.image(x, quantizer.bits, quantizer.groups, clip)

    def to(self, targets: Iterable[Node], env: dict[Node, Any]) -> dict[Node, Any]:
        """Compute targets from the values in env, releasing what nothing needs any more; returns env."""
        schedule = executor.Schedule(self.gm, list(targets), env)
        for node in schedule.order:
            env[node] = self.node(node, env)
            for dead in schedule.release.get(node, ()):
                env.pop(dead, None)
        return env


@torch.no_grad()
def shared_values(run: Run, ids: Tensor, start: Node) -> dict[Node, Any]:
    """Graph inputs and what blocks need beside the stream, for sequences [B, S] from an empty cache."""
    env = executor.shared_values(run.gm, ids, start)
    return {**executor.first_tokens(run.gm, ids), **env}
