"""Where a graph can be cut: values from which, beside tables that all blocks share, everything later is computed.

Found by what is alive, with no knowledge of blocks: every graph that was captured here can be cut, quantized or not. Values that live
across several attentions lead past cuts, as embeddings of each layer and shared keys and values do (`executor.carried`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.graph_tools import aten

ATTENTIONS = (ops.attention, aten.scaled_dot_product_attention.default, aten.softmax.int)


def cuts(gm: GraphModule) -> list[Node]:
    """The cuts between token ids and logits, in order, all of one width. Raises TopologyError: there are none."""
    graph = gm.graph
    logits, inputs = graph_tools.output_args(graph)[0], graph_tools.placeholders(graph)
    hidden = executor.depends_on(gm, executor.lookups(gm))
    order = [n for n in executor.Schedule(gm, [logits], inputs).order if n in hidden]
    release = executor.last_uses(order, keep=set())
    long = long_lived(order)
    alive: set[Node] = set()
    found = []
    for node in order:
        alive.add(node)
        alive.difference_update(release.get(node, ()))
        if alive - long == {node} and node is not logits:
            found.append(node)
    if not found:
        raise TopologyError("the graph has no value that all later ones come from: it can only be run whole")
    # A lookup beside the stream may have another width, and come first.
    ((width, _),) = Counter(map(values.width, found)).most_common(1)
    return [node for node in found if values.width(node) == width]


def long_lived(order: Sequence[Node]) -> set[Node]:
    """The values that are read behind another attention than the first one after they were made."""
    done, made, found = 0, dict[Node, int](), set[Node]()
    for node in order:
        done += graph_tools.is_call(node, *ATTENTIONS)
        made[node] = done
        found.update(n for n in node.all_input_nodes if n in made and done > made[n] + 1)
    return found
