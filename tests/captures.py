"""One torch.export for all models of one structure: it takes half of a tiny compile, and looks at no weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from resq_compiler.frontend import capture as frontend
from resq_compiler.frontend.capture import Captured
from resq_compiler.ir import graph_tools
from resq_compiler.ir.promises import Promise

PLAIN = (bool, int, float, str, type(None))


class SharedCaptures:
    """In the place of `capture_promised`: equal structures are exported once, each compile gets a graph of its own with its weights."""

    def __init__(self) -> None:
        self.made: dict[Any, Captured] = {}

    def __call__(self, skeleton: PreTrainedModel, weights: Mapping[str, Promise]) -> Captured:
        if any(
            "forward" in vars(module) for module in skeleton.modules()
        ):  # a test's own: the structure does not say it
            return frontend.capture_promised(skeleton, weights)
        key = structure(skeleton)
        if key not in self.made:
            captured = frontend.capture_promised(skeleton, weights)
            self.made[key] = without_weights(captured, weights)
            return captured
        first = self.made[key]
        gm, buffers = graph_tools.snapshot(first.graph_module), dict(skeleton.named_buffers(remove_duplicate=False))
        for target in {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}:
            found = graph_tools.tensor_named(gm, target)
            if isinstance(found, torch.Tensor):
                graph_tools.set_tensor(gm, target, frontend._value_of(target, found, weights, buffers))
        return Captured(gm, first.cache, first.example_inputs)


def without_weights(captured: Captured, weights: Mapping[str, Promise]) -> Captured:
    """A copy that keeps no model alive."""
    gm = graph_tools.snapshot(captured.graph_module)
    for target in {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} & weights.keys():
        graph_tools.set_tensor(gm, target, torch.empty(0))
    return Captured(gm, captured.cache, captured.example_inputs)


def structure(skeleton: PreTrainedModel) -> tuple:
    """All that an export depends on: classes and plain attributes of modules, shapes and ties of weights, values of buffers."""
    config = {name: value for name, value in skeleton.config.to_dict().items() if name != "_name_or_path"}
    first: dict[int, str] = {}
    parameters = [
        (name, tuple(p.shape), p.dtype, first.setdefault(id(p), name))
        for name, p in skeleton.named_parameters(remove_duplicate=False)
    ]
    buffers = [(name, b.dtype, repr(b.tolist())) for name, b in skeleton.named_buffers(remove_duplicate=False)]
    modules = [(name, type(m), plain(m)) for name, m in skeleton.named_modules()]
    return (repr(config), skeleton.config._attn_implementation, tuple(parameters), tuple(buffers), tuple(modules))


def plain(module: torch.nn.Module) -> tuple:
    return tuple(
        sorted((name, repr(v)) for name, v in vars(module).items() if isinstance(v, PLAIN) and name != "name_or_path")
    )
