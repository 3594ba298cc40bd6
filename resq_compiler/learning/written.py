"""More text to learn from, which the float model writes: windows begin with pieces of the calibration text and go on as the model does.

What learning moves has many more numbers than a calibration text has tokens; the float model's predictions are all it aims at, and they
can be had for any text. Source: LLM-QAT, arXiv 2305.17888, section 3.1; differs: beginnings are text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import devices

BATCH = 32  # windows at once; their cache is what memory holds
BEGINNING = 1 / 16  # of a window


@torch.no_grad()
def write_windows(
    gm: GraphModule, windows: Tensor, count: int, seed: int, progress: Callable[[int, int], None]
) -> Tensor:
    """`count` windows of the length of `windows` [n, length], each begun with tokens from somewhere in these: [count, length] int64.

    Drawn at temperature 1 from the graph as it is; equal arguments give equal windows on one machine.
    """
    length = windows.shape[1]
    begun = max(1, int(length * BEGINNING))
    draw = generator(seed, "written windows")
    rows = torch.randint(len(windows), (count,), generator=draw)
    starts = torch.randint(length - begun + 1, (count,), generator=draw)
    beginnings = windows[rows].gather(1, starts[:, None] + torch.arange(begun))
    found, batches = [], beginnings.split(BATCH)
    for i, batch in enumerate(batches):
        progress(i, len(batches))
        found.append(_go_on(gm, batch, length, draw))
    return torch.cat(found) if found else windows[:0]


def _go_on(gm: GraphModule, begun: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """Windows [B, n] written on to [B, length], a token at a time on the graph's own cache."""
    inputs, (logits, *present) = graph_tools.placeholders(gm.graph), graph_tools.output_args(gm.graph)
    schedule = executor.Schedule(gm, [logits, *present], inputs)
    written, env = begun, executor.first_tokens(gm, begun)
    weights = {} if devices.current() is None else executor.weights_of(gm, schedule.order)
    while written.shape[1] < length:
        env |= weights
        schedule.run(env)
        token = torch.multinomial(env[logits][:, -1].float().softmax(-1).cpu(), 1, generator=draw)
        written = torch.cat((written, token), 1)
        new = executor.first_tokens(gm, written)
        ids, mask, positions = (new[node] for node in inputs[:3])
        past = dict(zip(inputs[3:], (env[node] for node in present), strict=True))
        env = {inputs[0]: ids[:, -1:], inputs[1]: mask, inputs[2]: positions[:, -1:].contiguous(), **past}
    return written
