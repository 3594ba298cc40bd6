"""Float weights that are promised are made once before learning, because every step reads all of them."""

from __future__ import annotations

from torch.fx import GraphModule

from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.ir import graph_tools
from resq_compiler.ir.promises import Promised, in_memory


def hold(gm: GraphModule, work: WorkDirectory | None) -> None:
    """Make what is promised still: in memory, or in mapped files of the work directory, where what is changed later stays a promise."""
    names = [name for name, value in gm.named_buffers() if isinstance(value, Promised)]
    graph_tools.settle(gm, None if work is None else work.path)
    for name in names if work is not None else ():
        graph_tools.set_tensor(gm, name, Promised(in_memory(graph_tools.tensor_named(gm, name))))
