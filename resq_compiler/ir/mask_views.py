"""Views of masks."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from resq_compiler.ir import ops
from resq_compiler.ir.args import node_arg, optional_int_arg
from resq_compiler.ir.views import View


@dataclass(frozen=True)
class CausalMask(View):
    """Which keys a query may see; with a window only the latest."""

    targets = (ops.causal_mask,)
    attention_mask: Node
    input_ids: Node
    window: int | None

    @classmethod
    def read(cls, node: Node) -> CausalMask:
        return cls(
            node, node_arg(node, "attention_mask"), node_arg(node, "input_ids"), optional_int_arg(node, "window")
        )
