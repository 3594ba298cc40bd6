"""Learning block by block against the output of the float block: the memory of one block, for models of any depth.

The block gets the stream that the quantized blocks before it make, and is to give what the float model gives there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.analysis.topology import Block
from resq_compiler.learning.end_to_end import Border, Model
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.losses import relative_square
from resq_compiler.learning.running import Run
from resq_compiler.util import memory


@dataclass
class BlockTask:
    """Steps and judgements for one block. inputs, targets: the values before and behind it, for each window.

    held: so many windows at the end are for judging alone.
    """

    model: Model
    block: Block
    learned: Learned
    windows: Tensor
    inputs: list[Border]
    targets: list[Border]
    held: int

    def loss(self, run: Run, index: int) -> Tensor:
        """Of what the block makes of the input of a window."""
        ids, end = self.windows[index : index + 1], self.block.end
        return relative_square(self.model.to_border(run, ids, end, self.inputs[index])[end], self.targets[index][end])

    def step(self, picked: list[int]) -> float:
        """The mean loss of some windows, with gradients in the parameters."""
        total = 0.0
        with torch.enable_grad():
            self.learned.begin()
            for i in picked:
                run = self.learned.run(self.model.gm)
                loss = self.loss(run, i) / len(picked)
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
        losses = [float(self.loss(run, i)) for i in indices]
        memory.trim()
        return sum(losses) / len(losses)


@torch.no_grad()
def advance(model: Model, run: Run, block: Block, windows: Tensor, before: list[Border]) -> list[Border]:
    """The values behind a block, for each window."""
    pairs = zip(windows.split(1), before, strict=True)
    return [model.to_border(run, ids, block.end, given) for ids, given in pairs]
