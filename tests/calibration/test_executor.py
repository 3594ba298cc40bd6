from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from resq_compiler.calibration import executor
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.ir import graph_tools
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens


@pytest.fixture
def chain():
    """x -> a -> b -> d, a -> c -> d."""
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.mul.Tensor, (x, 2.0))
    b = graph.call_function(aten.add.Tensor, (a, 1.0))
    c = graph.call_function(aten.mul.Tensor, (a, a))
    d = graph.call_function(aten.add.Tensor, (b, c))
    graph.output((d,))
    return GraphModule({}, graph), (x, a, b, c, d)


def test_values_are_released_after_their_last_use(chain):
    gm, (x, a, b, c, d) = chain
    env = {x: torch.tensor(3.0)}
    executor.Schedule(gm, [d], [x]).run(env)
    assert set(env) == {x, d} and env[d] == 43.0


def test_only_what_is_needed_runs(chain):
    gm, (x, a, b, c, d) = chain
    assert executor.Schedule(gm, [b], [x]).order == [a, b]
    assert executor.Schedule(gm, [d], [b, c]).order == [d]
    assert executor.Schedule(gm, [b], [b]).order == []


def test_taps_see_values_once(chain):
    gm, (x, a, b, c, d) = chain
    seen = []
    executor.Schedule(gm, [d], [x]).run({x: torch.tensor(1.0)}, {a: seen.append, c: seen.append})
    assert [float(v) for v in seen] == [2.0, 4.0]


def test_a_stretch_keeps_what_the_rest_of_the_way_needs(chain):
    gm, (x, a, b, c, d) = chain
    env = {x: torch.tensor(3.0)}
    first = executor.Stretch(gm, [b], [x], goal=d)
    first.run(env)
    assert set(env) == {x, a, b} and {a, b} <= first.alive
    second = executor.Stretch(gm, [d], [a, b], goal=d)
    second.run(env)
    assert second.order == [c, d] and env[d] == 43.0


def test_what_is_only_to_be_seen_is_not_kept(chain):
    """It comes from weights that are going to change: c is on the way, and is computed again."""
    gm, (x, a, b, c, d) = chain
    env = {x: torch.tensor(3.0)}
    stretch = executor.Stretch(gm, [b], [x], goal=d, also=[c])
    stretch.run(env)
    assert c in env and stretch.alive == {a, b}


def test_a_goal_that_is_known_stays_known(chain):
    """Else the next stretch would start again from the inputs: right, and quadratic in the number of blocks."""
    gm, (x, a, b, c, d) = chain
    runner = Lockstep(gm, [{x: torch.tensor(3.0)}], [{}], room=0)
    runner.run([d], d, lambda i, env: None)
    runner.advance(d)
    assert float(runner.known()[d]) == 43.0 and set(runner.known()) == {d}


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_runs_like_the_model(family, build, tiny):
    """The stream's end in the schedule is the input of lm_head's norm in the eager model: compare logits."""
    built = build(family, "fold-norms")
    head, ids = built.topology.head, tiny_tokens(3, 11)
    env = executor.first_tokens(built.gm, ids)
    logits = graph_tools.output_args(built.gm.graph)[0]
    executor.Schedule(built.gm, [logits], env).run(env)
    with torch.no_grad():
        expected = tiny(family)(ids, use_cache=False).logits
    assert relative_error(env[logits], expected) < 1e-5 and head.graph is built.gm.graph  # float32 rounding


def test_shared_values_are_enough_to_run_blocks(build):
    built = build("gemma3", "fold-norms")
    topology, ids = built.topology, tiny_tokens(2, 9)
    env = executor.first_tokens(built.gm, ids)
    executor.Schedule(built.gm, [topology.blocks[0].start, topology.blocks[-1].end], env).run(env)
    shared = executor.shared_values(built.gm, ids, topology.blocks[0].start)
    assert not any(n.op == "get_attr" for n in shared)
    state = {**shared, topology.blocks[0].start: env[topology.blocks[0].start]}
    for block in topology.blocks:
        plan = executor.Stretch(built.gm, [block.end], state, block.end)
        assert not any(n.target is aten.embedding.default for n in plan.order)
        plan.run(state)
    assert torch.equal(
        state[topology.blocks[-1].end], env[topology.blocks[-1].end]
    )  # the same operators on the same bits


def test_batches_hold_a_bounded_number_of_tokens():
    for length in (32, 512, 8192):
        windows = torch.arange(20 * length).reshape(20, length)
        found = executor.batches(windows)
        assert torch.equal(torch.cat(found), windows)
        assert all(b.numel() <= max(executor.TOKENS_PER_BATCH, length) for b in found)


def test_depends_on(chain):
    gm, (x, a, b, c, d) = chain
    assert executor.depends_on(gm, [b]) >= {b, d} and not executor.depends_on(gm, [b]) & {a, c, x}
