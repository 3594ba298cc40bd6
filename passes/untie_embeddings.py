"""untie-embeddings: give lm_head its own weight where it shares the embedding's.

Both change differently when a basis change or a norm's gain is folded in, so this comes before any weight moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler.ir import graph_tools
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class UntieEmbeddings(Pass):
    """Clone a weight that an embedding and a linear share."""

    name: ClassVar[str] = "untie-embeddings"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        done = 0
        for linear in list(gm.graph.find_nodes(op="call_function", target=aten.linear.default)):
            weight = linear.args[1]
            shared = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == weight.target]
            if not any(is_call(user, aten.embedding.default) for n in shared for user in n.users):
                continue
            value = graph_tools.get_tensor(gm, weight)
            linear.update_arg(
                1,
                graph_tools.add_tensor(
                    gm, f"{graph_tools.module_of(linear) or 'lm_head'}.untied.weight", value.clone(), self.name
                ),
            )
            done += 1
        return done
