"""Passes that learn against the predictions of the float model: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping

from resq_compiler.learning.end_to_end import EndToEnd, Loss, Model
from resq_compiler.learning.holding import hold
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.loop import Plan, Task, held_back, learn, report
from resq_compiler.pipeline.passes import PassContext


def learn_end_to_end(
    name: str, model: Model, learned: Learned, loss: Loss, plan: Plan, ctx: PassContext,
    factors: Mapping[str, float] | None = None,
) -> int:  # fmt: skip
    """Learn for the pass of this name, tell what it came to, and write what is better than the start; returns how many transforms.

    factors: of the rate, as in `Task`.
    """
    held = held_back(len(ctx.windows), name)
    hold(model.gm, ctx.work)
    work = EndToEnd(model, learned, ctx.windows, held, loss)
    task = Task(name, learned, len(ctx.windows) - held, work.step, work.judge, factors or {})
    with learned.computing():
        outcome = learn(task, plan, ctx.seed, ctx.work, ctx.progress)
    report(ctx.lines, ctx.note, name, outcome)
    if not outcome.improved:
        return 0
    learned.write(model.gm, name)
    return len(learned.transforms)
