"""Learning block by block against the output of the float block: the memory of one block, for models of any depth.

The block gets the stream that the quantized blocks before it make, and is to give what the float model gives there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.analysis.topology import Block
from resq_compiler.learning.end_to_end import Model
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.losses import relative_square
from resq_compiler.learning.running import Run
from resq_compiler.util import memory


@dataclass
class BlockTask:
    """Steps and judgements for one block. inputs, targets: the stream before and behind it, for each window [1, length, d].

    held: so many windows at the end are for judging alone.
    """

    model: Model
    block: Block
    learned: Learned
    windows: Tensor
    inputs: list[Tensor]
    targets: list[Tensor]
    held: int

    def output(self, run: Run, index: int) -> Tensor:
        """What the block makes of the input of a window."""
        env = {**self.model.shared(run, self.windows[index : index + 1]), self.block.start: self.inputs[index]}
        found: Tensor = run.to([self.block.end], env)[self.block.end]
        return found

    def step(self, picked: list[int]) -> float:
        """The mean loss of some windows, with gradients in the parameters."""
        total = 0.0
        with torch.enable_grad():
            self.learned.begin()
            for i in picked:
                run = self.learned.run(self.model.gm)
                loss = relative_square(self.output(run, i), self.targets[i]) / len(picked)
                loss.backward()
                total += float(loss.detach())
            self.learned.end()
        return total

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss of the windows that are held back."""
        self.learned.begin()
        run = self.learned.run(self.model.gm)
        indices = range(len(self.windows) - self.held, len(self.windows))
        losses = [float(relative_square(self.output(run, i), self.targets[i])) for i in indices]
        memory.trim()
        return sum(losses) / len(losses)


@torch.no_grad()
def advance(model: Model, run: Run, block: Block, windows: Tensor, stream: list[Tensor]) -> list[Tensor]:
    """The stream behind a block, for each window."""
    found = []
    for ids, value in zip(windows.split(1), stream, strict=True):
        env = {**model.shared(run, ids), block.start: value}
        found.append(run.to([block.end], env)[block.end])
    return found
