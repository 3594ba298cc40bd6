"""A result as plain values and tensors, for pickle; and a graph from its text form and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.frontend import capture
from resq_compiler.ir import graph_tools, serialize, verify
from resq_compiler.result import CompileResult
from resq_compiler.storage import tensor_files


def portable(result: CompileResult) -> dict[str, Any]:
    """The fields of a result in forms that pickle takes; without stages and topology, which hold graphs of other moments."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    for unkept in ("graph_module", "stages", "topology"):
        del fields[unkept]
    gm = result.graph_module
    graph = serialize.graph_to_dict(gm.graph, tensor_files.describe(gm))
    tensors = {str(n.target): graph_tools.get_tensor(gm, n) for n in gm.graph.find_nodes(op="get_attr")}
    return {"fields": fields, "graph": graph, "tensors": tensors}


def from_portable(contents: Mapping[str, Any]) -> CompileResult:
    """The result that `portable` took apart."""
    fields = contents["fields"]
    vocabulary = fields["config"].get_text_config().vocab_size
    graph_module = assembled(contents["graph"], contents["tensors"], fields["cache_specs"], vocabulary)
    return CompileResult(graph_module, **fields)


def assembled(
    graph: Mapping[str, Any], tensors: Mapping[str, Tensor], cache: tuple[capture.CacheSpec, ...], vocabulary: int
) -> GraphModule:
    """A graph from its serialized form and its tensors, checked."""
    gm = GraphModule(torch.nn.Module(), torch.fx.Graph(), class_name="CompiledGraph")
    for name, value in tensors.items():
        graph_tools.set_tensor(gm, name, value)
    gm.graph = serialize.dict_to_graph(graph)
    verify.check_graph(gm)
    verify.propagate_shapes(gm, capture.concrete_example(vocabulary, cache))
    return gm
