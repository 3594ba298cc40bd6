"""Where a graph can be cut: values from which alone, beside tables that all blocks share, everything later is computed.

Found by what is alive, with no knowledge of blocks: every graph that was captured here can be cut, quantized or not.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.graph_tools import aten


def cuts(gm: GraphModule) -> list[Node]:
    """The cuts between token ids and logits, in order, all of one width. Raises TopologyError: there are none."""
    graph = gm.graph
    logits, inputs = graph_tools.output_args(graph)[0], graph_tools.placeholders(graph)
    lookups = graph.find_nodes(op="call_function", target=aten.embedding.default)
    embedded = [n for n in lookups if inputs[0] in graph_tools.ancestors(list(n.all_input_nodes[1:]))]
    hidden = executor.depends_on(gm, embedded)
    order = [n for n in executor.Schedule(gm, [logits], inputs).order if n in hidden]
    release = executor.last_uses(order, keep=set())
    alive: set[Node] = set()
    found = []
    for node in order:
        alive.add(node)
        alive.difference_update(release.get(node, ()))
        if alive == {node} and node is not logits:
            found.append(node)
    if not found:
        raise TopologyError("the graph has no value that all later ones come from: it can only be run whole")
    return [node for node in found if values.width(node) == values.width(found[0])]
