"""A prefill and the decode that reads its cache, through a graph together: every weight is made once, and let go behind both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration.executor import Schedule, run_node
from resq_compiler.ir import graph_tools, promises
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Linear
from resq_compiler.util import devices


@torch.no_grad()
def run_behind(gm: GraphModule, prefill: Sequence[Tensor], decode: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of both. decode: inputs before the cache; its cache is what the prefill writes.

    The decode stays as close behind the prefill as the cache allows: of a block, what either has passed is gone.
    """
    inputs, outputs = graph_tools.placeholders(gm.graph), graph_tools.output_args(gm.graph)
    logits, present = outputs[0], dict(zip(outputs[1:], inputs[3:], strict=True))
    schedule = Schedule(gm, outputs, inputs, keep=[logits])
    first: dict[Node, Any] = dict(zip(inputs, map(devices.here, prefill), strict=True))
    second: dict[Node, Any] = dict(zip(inputs, map(devices.here, decode), strict=False))
    with promises.keeping():
        _run(gm, schedule, first, second, present)
    return first[logits], second[logits]


def reads_promise(node: Node, env: Mapping[Node, Any]) -> bool:
    """Whether a node multiplies with a matrix that is promised, as lm_head: every product makes all of it, or all that it comes from."""
    linear = Linear.of(node) if is_call(node, aten.linear.default) else None
    return linear is not None and isinstance(env[linear.weight], promises.Promised)


def is_turned(gm: GraphModule, node: Node) -> bool:
    """Whether a node is a weight that only linears read, and that products can do without: the few tokens here are turned instead."""
    if node.op != "get_attr":
        return False
    return promises.goes_around(graph_tools.held(gm, node)) and all(is_call(n, aten.linear.default) for n in node.users)


def together(
    gm: GraphModule, node: Node, first: Mapping[Node, Any], second: Mapping[Node, Any]
) -> tuple[Tensor, Tensor]:
    """A linear of both runs, in one product."""
    x = Linear.require(node).x
    one, two = first[x].flatten(0, -2), second[x].flatten(0, -2)
    both = run_node(gm, node, {**first, x: torch.cat((one, two))})
    ahead, behind = both.split((len(one), len(two)))
    return ahead.unflatten(0, first[x].shape[:-1]), behind.unflatten(0, second[x].shape[:-1])


def _run(
    gm: GraphModule, schedule: Schedule, first: dict[Node, Any], second: dict[Node, Any], present: dict[Node, Node]
) -> None:
    waiting: list[Node] = []
    for node in schedule.order:
        if is_turned(gm, node):
            first[node] = graph_tools.held(gm, node)
        elif reads_promise(node, first) and not waiting:
            first[node], second[node] = together(gm, node, first, second)
        else:
            first[node] = run_node(gm, node, first)
        waiting.append(node)
        if node in present:
            second[present[node]] = first[node]
        if node.op == "get_attr":
            second[node] = first[node]
        while waiting and (waiting[0] in second or all(n in second for n in waiting[0].all_input_nodes)):
            follower = waiting.pop(0)
            if follower not in second:
                second[follower] = run_node(gm, follower, second)
            for done in schedule.release.get(follower, ()):
                second.pop(done, None)
        for done in schedule.release.get(node, ()):
            first.pop(done, None)
