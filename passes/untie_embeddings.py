"""untie-embeddings: give lm_head its own weight where it shares the embedding's.

Both change differently when a basis change or a norm's gain is folded in, so this comes before any weight moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler.ir import graph_tools
from resq_compiler.ir.args import set_argument
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Linear
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class UntieEmbeddings(Pass):
    """Clone a weight that an embedding and a linear share."""

    name: ClassVar[str] = "untie-embeddings"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        done = 0
        for linear in [view for node in gm.graph.nodes if (view := Linear.of(node)) is not None]:
            shared = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == linear.weight.target]
            if not any(is_call(user, aten.embedding.default) for n in shared for user in n.users):
                continue
            name = f"{graph_tools.module_of(linear.node) or 'lm_head'}.untied.weight"
            own = graph_tools.add_tensor(gm, name, graph_tools.held(gm, linear.weight), self.name)
            set_argument(linear.node, "weight", own)
            done += 1
        return done
