"""Plain records of graph nodes: what dumps, pages and differences are made of. No tensor data."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.views import CodedLinear, Dequantize, Quantize, QuantizeDequantize

CODES = ("quantize", "quantized_linear", "weight_only_linear", "quantized_expert_linear", "weight_only_expert_linear",
         "quantize_dequantize", "dequantize")  # fmt: skip


def graph_records(graph: Graph) -> list[dict[str, Any]]:
    """One record for each node, in execution order.

    Keys: name, op, target (short name), text (the call), inputs (names), values ([dtype, shape] of each tensor), module, pass
    (which made the node), block (decoder block or None), bits (for example "4", "W4A8", "4|8"; "" = float), precision
    ("float", "4", "8", "mixed", ...), facts (name -> fields, from resq_compiler.meta).
    """
    blocks = blocks_of(graph)
    return [_record(node, blocks[node]) for node in graph.nodes]


def _record(node: Node, block: int | None) -> dict[str, Any]:
    origin = meta.get(node, meta.Origin)
    bits = bits_of(node)
    return {
        "name": node.name,
        "op": node.op,
        "target": target_name(node),
        "text": call_text(node),
        "inputs": [n.name for n in node.all_input_nodes],
        "values": values_of(node),
        "module": module_name(node),
        "pass": origin.made_by if origin else "capture",
        "block": block,
        "bits": bits,
        "precision": precision_of(bits),
        "facts": {type(f).__name__: meta.to_dict(f) for f in meta.facts(node) if dataclasses.is_dataclass(f)
                  and not isinstance(f, (meta.Origin, type))},
    }  # fmt: skip


def target_name(node: Node) -> str:
    """The operator without its namespace, such as linear or quantize; for tensors and inputs their own name."""
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def call_text(node: Node) -> str:
    """The call as Python-like text, inputs as %name."""
    if node.op in ("placeholder", "get_attr"):
        return f"{'input' if node.op == 'placeholder' else 'tensor'} {node.target}"
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{target_name(node)}({', '.join(args)})"


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(_text, value)) + right
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else repr(value)


def values_of(node: Node) -> list[list[Any]]:
    """[dtype, shape] of every tensor of a node's value on the example sizes; empty where it is not known."""
    leaves = pytree.tree_leaves(node.meta.get(meta.VALUE))
    return [[str(t.dtype).removeprefix("torch."), [int(s) for s in t.shape]] for t in leaves if isinstance(t, Tensor)]


def module_name(node: Node) -> str:
    """Path of the original module: from provenance, or the tensor's own name."""
    module = graph_tools.module_of(node)
    return str(node.target).rpartition(".")[0] if not module and node.op == "get_attr" else module


def bits_of(node: Node) -> str:
    """Bits of the codes a node makes, holds or multiplies; "" where everything is float."""
    if (quantizer := Quantize.of(node)) is not None:
        return str(quantizer.bits)
    if (image := Dequantize.of(node)) is not None:
        return bits_of(image.codes)
    if (entry := QuantizeDequantize.of(node)) is not None:
        return "|".join(str(bits) for bits, _, _ in entry.parts)
    part = meta.get(node, meta.LinearPart)
    coded = CodedLinear.of(node)
    if part is not None and coded is not None:
        bits = part.weight_bits_text
        return f"W{bits}A{part.activation_bits}" if coded.on_codes else f"W{bits}"
    if node.op == "get_attr":
        parts = {
            p.weight_bits_text for u in node.users if (p := meta.get(u, meta.LinearPart)) and u.target in CODE_LINEARS
        }
        return parts.pop() if len(parts) == 1 else ""
    return ""


CODE_LINEARS = CodedLinear.targets


def precision_of(bits: str) -> str:
    """The class a node is coloured by: float, a number of bits, or mixed."""
    numbers = {int(n) for n in re.findall(r"\d+", bits)}
    if not numbers:
        return "float"
    return str(numbers.pop()) if len(numbers) == 1 else "mixed"


SHARED = 3  # a value that so many other blocks read is no part of the block that happened to make it first


def blocks_of(graph: Graph) -> dict[Node, int | None]:
    """The decoder block of every node: its facts, else its module's number, else the one block that all its users are in.

    None for what stands outside, such as masks and rotary tables, also where the first block computed them.
    """
    blocks: dict[Node, int | None] = {}
    for node in reversed(graph.nodes):
        block = _own_block(node)
        if block is not None and len({blocks.get(user) for user in node.users} - {block, None}) >= SHARED:
            block = None
        if block is None and node.op in ("placeholder", "get_attr"):
            users = {blocks.get(user) for user in node.users}  # a malformed graph may be out of order
            block = users.pop() if len(users) == 1 else None
        blocks[node] = block
    return blocks


def _own_block(node: Node) -> int | None:
    part, site = meta.get(node, meta.LinearPart), meta.get(node, meta.QuantizerSite)
    linear = meta.get(node, meta.LinearSite) or (part.site if part else None)
    for fact in (site, linear):
        if fact is not None:
            return fact.block
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", module_name(node) if node.op != "get_attr" else str(node.target))
    return int(numbers[0]) if numbers else None
