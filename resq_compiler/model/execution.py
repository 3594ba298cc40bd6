"""What computes a compiled model: its quantized graph, or what a backend made of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from resq_compiler.backends import backends_for, load_backend
from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.stages import Stage
from resq_compiler.result import CompileResult
from resq_compiler.util.torch_state import without_autocast

log = logging.getLogger("resq_compiler")


class Execution(nn.Module):
    """Runs the graph on the chosen backend. One holder of the weights at a time: the graph, or a backend that packs them.

    backend, options: its name and what it was made with. As a module it moves with `.to(device)`.
    """

    def __init__(self, graph_module: GraphModule):
        super().__init__()
        self.backend, self.options = "reference", dict[str, Any]()
        self._graph: GraphModule | None = graph_module
        self._lowered: Any = None

    @property
    def graph_module(self) -> GraphModule:
        """The quantized graph. A backend that holds the weights in a form of its own makes it again for whoever asks."""
        if self._graph is not None:
            return self._graph
        restored: GraphModule = self._lowered.quantized_graph()
        return restored

    @property
    def runner(self) -> Any:
        """What is called: the quantized graph, or what a backend made of it (triton: a module with the lowered graph_module)."""
        return self._graph if self._lowered is None else self._lowered

    def forward(self, *tensors: Tensor, logits_to_keep: int = 0) -> tuple[Tensor, ...]:
        """Graph inputs to graph outputs. logits_to_keep: the last so many tokens whose logits are asked for, 0 for all; more may come."""
        self.settle()
        kept = {"logits_to_keep": logits_to_keep} if getattr(self.runner, "takes_logits_to_keep", False) else {}
        with without_autocast():
            outputs: tuple[Tensor, ...] = self.runner(*tensors, **kept)
        return outputs

    def settle(self) -> None:
        """Read what still lies in files alone, packed: a graph that computes has its codes in memory."""
        if self._graph is not None and graph_tools.promised_bytes(self._graph):
            graph_tools.settle(self._graph)

    def move_constructors(self, device: torch.device) -> None:
        """Let the graph that runs make its tensors on a device, where its weights have gone."""
        graph = self._graph if self._lowered is None else getattr(self._lowered, "graph_module", None)
        if isinstance(graph, GraphModule) and device.type != "meta":
            graph_tools.move_constructors(graph, device)

    def switch(self, result: CompileResult, name: str, options: dict[str, Any]) -> tuple[Stage, ...]:
        """Compute with another backend from now on; returns what it made of the graph, as stages of a dump.

        Raises BackendError, and nothing has changed: no such backend or option, it cannot run here or cannot take the graph.
        """
        if name == "auto":
            return self._switch_to_best(result, options)
        lowered = load_backend(name, **options).prepare(result) if name != "reference" or options else None
        packs = hasattr(lowered, "quantized_graph")
        if packs:
            result.graph_module.graph.owning_module = (
                None  # facts refer to nodes, which must not keep the weights alive
            )
        self._graph = None if packs else result.graph_module
        del self._lowered  # one that was a module, registered as such, may be followed by one that is none
        self._lowered, self.backend, self.options = lowered, name, options
        return tuple(getattr(lowered, "stages", ()))

    def _switch_to_best(self, result: CompileResult, options: dict[str, Any]) -> tuple[Stage, ...]:
        """The best backend for where the weights are that runs here and takes the graph; the log says why others do not."""
        if options:
            raise BackendError(
                f"backend auto: options {sorted(options)}; it takes none, since they differ from backend to backend"
            )
        *better, last = backends_for(next(result.graph_module.buffers()).device.type)
        for name in better:
            try:
                return self.switch(result, name, {})
            except BackendError as error:
                log.warning("backend auto: not %s: %s", name, error)
        return self.switch(result, last, {})
