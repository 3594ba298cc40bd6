"""The loop: falls, keeps the best, goes back from NaN, stops early, resumes to the bit, and never ends worse than it began."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import DataError
from resq_compiler.learning.loop import Plan, Task, held_back, learn


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0, -2.0]))


def task(point, judge=None, spoil=None, windows=4):
    """Fall to the origin; every window has a slope of its own. spoil: steps whose loss is NaN."""
    steps = iter(range(10**6))
    slopes = torch.tensor([0.9, 1.0, 1.1, 1.2])

    def step(picked):
        number = next(steps)
        with torch.enable_grad():
            loss = (point.x.square().sum() * slopes[picked]).mean()
            if spoil and number in spoil:
                loss = loss * math.nan
            loss.backward()
        return float(loss)

    return Task("test-learning", point, windows, step, judge or (lambda: float(point.x.square().sum())))


def quiet(*_):
    pass


@pytest.mark.parametrize("optimizer, rate", [("adam", 0.1), ("sgd", 0.05)])
def test_the_loss_falls_and_the_best_state_stays(optimizer, rate):
    point = Point()
    outcome = learn(task(point), Plan(60, rate, judge_every=5, optimizer=optimizer), 0, None, quiet)
    assert outcome.improved and outcome.start == 13 and outcome.best < 0.5
    assert float(point.x.detach().square().sum()) == pytest.approx(outcome.best)


def test_nothing_better_leaves_the_start_with_a_note():
    point = Point()
    judged = iter([1.0] + [2.0] * 100)
    outcome = learn(task(point, lambda: next(judged)), Plan(60, 0.1, judge_every=5, patience=3), 0, None, quiet)
    assert point.x.tolist() == [3.0, -2.0] and not outcome.improved
    assert outcome.done == 30  # three judgements without a better one, and the last quarter of the steps at a low rate
    assert (
        "30 steps found nothing better than the start" in outcome.notes[-1] and "the start stays" in outcome.notes[-1]
    )


def test_a_step_that_is_not_finite_goes_back_to_the_last_good_state():
    point = Point()
    outcome = learn(task(point, spoil={7}), Plan(40, 0.1, judge_every=5), 0, None, quiet)
    assert outcome.improved and bool(point.x.isfinite().all())
    assert [
        n
        for n in outcome.notes
        if "step 8 of test-learning" in n and "back to the state of step 5, at half the rate" in n
    ]


def test_learning_that_diverges_again_and_again_ends():
    point = Point()
    outcome = learn(task(point, spoil=set(range(100))), Plan(40, 0.1), 0, None, quiet)
    assert outcome.done == 3 and point.x.tolist() == [3.0, -2.0] and len(outcome.notes) == 4


def test_a_loss_that_is_not_finite_at_the_start_is_an_error():
    with pytest.raises(DataError, match="test-learning: the loss is nan before the first step"):
        learn(task(Point(), lambda: math.nan), Plan(5, 0.1), 0, None, quiet)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    """Stopped behind a judgement, with a new optimizer in a new process."""
    plan = Plan(30, 0.1, judge_every=5)
    whole = Point()
    learn(task(whole), plan, 3, None, quiet)

    def stop(name, done, total):
        if done == 17:
            raise KeyboardInterrupt

    work = WorkDirectory(tmp_path / "work", {})
    with pytest.raises(KeyboardInterrupt):
        learn(task(Point()), plan, 3, work, stop)
    again = Point()
    outcome = learn(task(again), plan, 3, work, quiet)
    assert torch.equal(again.x, whole.x) and outcome.done == 30 and outcome.start == 13


def test_every_window_once_before_any_again():
    picked = []
    point = Point()
    one = task(point)
    kept = dataclasses.replace(one, step=lambda numbers: picked.extend(numbers) or one.step(numbers))
    learn(kept, Plan(5, 0.1, batch=2), 0, None, quiet)
    assert sorted(picked[:4]) == sorted(picked[4:8]) == [0, 1, 2, 3]


def test_rates_have_factors():
    """Adam's first step is as long as its rate, of which the warm-up leaves a tenth."""
    point = Point()
    learn(dataclasses.replace(task(point), factors={"x": 0.5}), Plan(1, 1.0), 0, None, quiet)
    torch.testing.assert_close(point.x.detach(), torch.tensor([2.95, -1.95]))


def test_a_temporary_work_directory_keeps_no_steps(tmp_path):
    """Nobody goes on from it."""
    work = WorkDirectory(tmp_path / "work", {}, temporary=True)
    learn(task(Point()), Plan(20, 0.1, judge_every=5), 0, work, quiet)
    assert [f.name for f in work.path.iterdir()] == ["fingerprint.json"]


def test_windows_that_are_held_back():
    assert [held_back(n, "x") for n in (2, 8, 16, 64)] == [1, 1, 2, 8]
    with pytest.raises(DataError, match="learn-x: 1 calibration windows are too few to learn from"):
        held_back(1, "learn-x")
