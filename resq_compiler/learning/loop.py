"""Steps of an optimizer that cannot end worse than they began: the best state on windows that were not trained on is the one that stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import DataError
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import devices

WARM_UP = 10  # steps until the rate is whole: the first steps of Adam are as long as the rate, whatever the gradient
RETREATS = 3  # after so many steps that were not finite, learning ends
LAST = 0.75  # of the steps: where the fall of the rate goes on when patience ends before; a seventh of the highest rate


@dataclass(frozen=True)
class Plan:
    """steps: at most. rate: the highest; it rises for WARM_UP steps and falls to zero as a cosine. batch: windows a step. judge_every:
    steps. patience: judgements without a better one that bring the last quarter of the fall forward; inside it, as many end learning.
    optimizer: "adam", or "sgd" with momentum 0.9.
    """

    steps: int
    rate: float
    batch: int = 1
    judge_every: int = 10
    patience: int = 5
    optimizer: Literal["adam", "sgd"] = "adam"


@dataclass
class Outcome:
    """What learning came to: the judged loss at the start and at the end, the step of the best state, and what a user should know."""

    start: float
    best: float
    step: int = 0
    done: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        """Whether what was learned is better than the start on windows that were not trained on."""
        return self.best < self.start


@dataclass(frozen=True)
class Task:
    """What is learned. name: of files, draws and messages. module: its parameters. step: from the numbers of windows to the loss, whose
    gradients are then in the parameters. judge: the loss on windows that are not trained on. factors: of the rate, by the first part of
    a parameter's name.
    """

    name: str
    module: nn.Module
    windows: int
    step: Callable[[list[int]], float]
    judge: Callable[[], float]
    factors: Mapping[str, float] = field(default_factory=dict)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by the factor of their rate, as optimizers take them."""
        found: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            found.setdefault(self.factors.get(name.partition(".")[0], 1.0), []).append(parameter)
        return [{"params": parameters, "factor": factor} for factor, parameters in found.items()]


def learn(
    task: Task, plan: Plan, seed: int, work: WorkDirectory | None, progress: Callable[[str, int, int], None]
) -> Outcome:
    """Run the steps; the module is left in the best state that was judged, its first one where none is better.

    A step whose loss or gradients are not finite takes the module back to the best state and halves the rate. A work directory keeps
    the state at every judgement, and learning goes on from it.
    """
    state = _State.begin(task, plan)
    state.resume(work)
    while state.place < plan.steps and state.stale < plan.patience and state.retreats < RETREATS:
        progress(task.name, state.place, plan.steps)
        state.advance(seed)
        if state.step % plan.judge_every == 0 or state.place == plan.steps:
            state.judge()
            state.hasten()
            state.keep(work)
    task.module.load_state_dict(state.best)
    progress(task.name, plan.steps, plan.steps)
    return state.finish()


@dataclass
class _State:
    """Where learning is. step: steps done. place: on the way of the rate, in steps."""

    task: Task
    plan: Plan
    optimizer: torch.optim.Optimizer
    outcome: Outcome
    best: dict[str, Tensor]
    step: int = 0
    place: int = 0
    stale: int = 0
    retreats: int = 0

    @classmethod
    def begin(cls, task: Task, plan: Plan) -> _State:
        if plan.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(task.groups(), lr=plan.rate, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(task.groups(), lr=plan.rate, betas=(0.9, 0.95), fused=True)
        loss = task.judge()
        if not math.isfinite(loss):
            raise DataError(f"{task.name}: the loss is {loss} before the first step; check the model and the text")
        return cls(task, plan, optimizer, Outcome(loss, loss), copy.deepcopy(task.module.state_dict()))

    def advance(self, seed: int) -> None:
        """One step."""
        falling = (1 + math.cos(math.pi * self.place / self.plan.steps)) / 2
        rate = self.plan.rate * 0.5**self.retreats * falling * min(1.0, (self.step + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad()
        picked = [self._window(seed, self.step * self.plan.batch + i) for i in range(self.plan.batch)]
        loss = self.task.step(picked)
        self.step, self.place = self.step + 1, self.place + 1
        gradients = [p.grad for p in self.task.module.parameters() if p.grad is not None]
        if math.isfinite(loss) and all(math.isfinite(g.sum()) for g in gradients):
            self.optimizer.step()
        else:
            self._retreat(f"step {self.step} of {self.task.name}: loss {loss} or a gradient of it is not finite")

    def _window(self, seed: int, index: int) -> int:
        """The window at a place in the order of all steps: every window once, in a random order, and again in another."""
        round_, place = divmod(index, self.task.windows)
        order = torch.randperm(self.task.windows, generator=generator(seed, self.task.name, round_))
        return int(order[place])

    def judge(self) -> None:
        """Compare with the best state so far."""
        loss = self.task.judge()
        if not math.isfinite(loss):
            self._retreat(f"step {self.step} of {self.task.name}: the loss on other windows is {loss}")
        elif loss < self.outcome.best:
            self.outcome.best, self.outcome.step, self.stale = loss, self.step, 0
            self.best = copy.deepcopy(self.task.module.state_dict())
        else:
            self.stale += 1

    def hasten(self) -> None:
        """Where patience ends at a high rate, go on at a low one: what still moves to and fro there comes to rest."""
        last = math.ceil(LAST * self.plan.steps)
        if self.stale >= self.plan.patience and self.place < last:
            self.place, self.stale = last, 0

    def _retreat(self, why: str) -> None:
        self.retreats += 1
        self.outcome.notes.append(f"{why}; back to the state of step {self.outcome.step}, at half the rate")
        self.task.module.load_state_dict(self.best)
        self.optimizer.state.clear()

    def finish(self) -> Outcome:
        """The outcome, with a note where nothing was gained."""
        self.outcome.done = self.step
        if not self.outcome.improved:
            self.outcome.notes.append(
                f"{self.task.name}: {self.step} steps found nothing better than the start on windows that were not trained on "
                f"(loss {self.outcome.start:.4g}); the start stays"
            )
        return self.outcome

    def keep(self, work: WorkDirectory | None) -> None:
        """Write everything that the next step depends on, if there is a work directory that somebody may go on from."""
        if work is None or work.temporary:
            return
        tensors = {f"now.{n}": t for n, t in self.task.module.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        for i, parameter in enumerate(self.task.module.parameters()):
            values = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{i}.{n}": torch.as_tensor(v) for n, v in values.items() if v is not None}
        numbers = (self.outcome.start, self.outcome.best)
        counts = (self.outcome.step, self.step, self.place, self.stale, self.retreats)
        tensors |= {"numbers": torch.tensor(numbers, dtype=torch.float64), "counts": torch.tensor(counts)}
        work.save(self.task.name, {name: tensor.cpu() for name, tensor in tensors.items()}, self.outcome.notes)

    def resume(self, work: WorkDirectory | None) -> None:
        """Go on where a work directory says that learning was."""
        saved = None if work is None else work.load(self.task.name)
        if saved is None:
            return
        tensors, self.outcome.notes = saved
        self.task.module.load_state_dict({n[4:]: t for n, t in tensors.items() if n.startswith("now.")})
        self.best = {n[5:]: devices.here(t) for n, t in tensors.items() if n.startswith("best.")}
        for i, parameter in enumerate(self.task.module.parameters()):
            prefix = f"optimizer.{i}."
            if found := {n[len(prefix) :]: devices.here(t) for n, t in tensors.items() if n.startswith(prefix)}:
                self.optimizer.state[parameter] = found
        self.outcome.start, self.outcome.best = tensors["numbers"].tolist()
        self.outcome.step, self.step, self.place, self.stale, self.retreats = (int(n) for n in tensors["counts"])


def judge_every(steps: int) -> int:
    """Judgements take time too: 20 of them, or one every 10 steps where these are fewer than 200."""
    return max(10, steps // 20)


def held_back(windows: int, name: str) -> int:
    """How many windows are for judging alone: an eighth, at least one. Raises DataError: there would be none to train on."""
    if windows < 2:
        raise DataError(
            f"{name}: {windows} calibration windows are too few to learn from: some are for judging alone; expected at least 2, "
            "and better 16 or more: give more text, or shorter windows (calibration_length)"
        )
    return max(1, windows // 8)


def report(lines: list[str], note: Callable[[str], None], name: str, outcome: Outcome) -> None:
    """Tell in the stage what learning came to, and a user what went wrong."""
    lines.append(
        f"{name}: loss on windows not trained on {outcome.start:.5g} at the start, {outcome.best:.5g} at step {outcome.step} of "
        f"{outcome.done}"
    )
    for text in outcome.notes:
        note(text)
