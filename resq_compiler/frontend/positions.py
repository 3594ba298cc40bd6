"""The longest text of a model that has a row of a table for every position: learned embeddings, tables of sines, masks, biases."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from transformers import PreTrainedConfig, PreTrainedModel

from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.args import argument, source
from resq_compiler.ir.graph_tools import aten, is_call

LOOKUPS = (aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor)
PADDING_ROWS = 16  # a table may hold some more rows than positions: OPT's has two


def longest_text(model: Any) -> int | None:
    """Tokens of the longest text that a model can take; None where no table ends, or where the model does not say.

    Rotary embeddings go on past the length of training, at a loss; there is no end in the model.
    """
    if hasattr(model, "longest_text"):  # a compiled model
        found: int | None = model.longest_text
        return found
    if not isinstance(model, PreTrainedModel):
        return None
    limit = _positions(model.config)
    return limit if limit is not None and _has_table(model, limit) else None


def longest_text_of_graph(graph: Graph, config: PreTrainedConfig) -> int | None:
    """The same of a graph: a table that is read by something else than token ids."""
    tokens, limit = graph_tools.placeholders(graph)[0], _positions(config)
    for node in graph.nodes:
        if not is_call(node, *LOOKUPS):
            continue
        table, *indices = node.all_input_nodes
        if table.op == "get_attr" and tokens not in graph_tools.ancestors(indices):
            return limit
    return longest_row_of_graph(graph, config)


def longest_row_of_graph(graph: Graph, config: PreTrainedConfig) -> int | None:
    """Tokens of the longest row, padding among them, of a graph that cuts its biases out of a table; None for others."""
    limit = _positions(config)
    slices = graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    return limit if limit is not None and any(_cuts_biases(node, limit) for node in slices) else None


def _cuts_biases(node: Node, limit: int) -> bool:
    """Whether a slice begins where the length of a text says, in a table made once for `limit` distances (ALiBi as MPT has it)."""
    if not isinstance(argument(node, "start"), Node) or values.shape(source(node))[-1] != limit:
        return False
    ranges = [n for n in graph_tools.ancestors([source(node)]) if is_call(n, aten.arange.start)]
    return any(argument(n, "start") == 1 - limit and argument(n, "end") == 1 for n in ranges)


def _positions(config: PreTrainedConfig) -> int | None:
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return int(found) if found else None


def _has_table(model: PreTrainedModel, limit: int) -> bool:
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    rows = [m.num_embeddings for m in tables] + [
        b.shape[0] for b in model.buffers() if isinstance(b, Tensor) and b.dim() == 2
    ]
    masks = [b.shape[-1] for b in model.buffers() if b.dim() > 2]
    biases = [getattr(m, "max_seq_length", None) for m in model.modules()]  # made by MPT's attention at every call
    return any(limit <= n < limit + PADDING_ROWS for n in rows) or limit in masks or limit in biases
