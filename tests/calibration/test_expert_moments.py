"""Second moments of what single experts read, against rows picked by hand."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.calibration import executor
from resq_compiler.calibration.expert_moments import ExpertInputs, ExpertMoments, ExpertReport, describe
from resq_compiler.calibration.experts import every_expert, on_every_expert
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.ir.args import source
from resq_compiler.numerics.expert_channels import ExpertEnergy
from resq_compiler.tiny import tiny_tokens
from tests.families import small

IDS = tiny_tokens(3, 16)


@pytest.fixture(scope="module")
def mixture():
    """The graph, the first mixture and its block, what its down projection reads, and which experts tokens went through."""
    gm, ctx = trace(small("mixtral"))
    block, feed_forward, experts = ctx.facts.get(Topology).mixtures[0]
    x = source(feed_forward.down)
    env = executor.first_tokens(gm, IDS)
    executor.Schedule(gm, [x, experts.indices], env).run(env)
    return gm, block, experts, x, env[x], env[experts.indices]


def moments(mixture, least: int) -> ExpertMoments:
    gm, block, experts, x, value, _ = mixture
    inputs = ExpertInputs("down", (x,), value.shape[-1], experts.indices, experts, lambda env, node: env[node])
    return ExpertMoments(inputs, Lockstep.begin(gm, list(IDS.split(1)), block.start), block.end, least)


def test_each_expert_has_the_moment_of_its_own_tokens(mixture):
    *_, value, indices = mixture
    found = moments(mixture, least=1)
    assert found.count() == torch.bincount(indices.flatten(), minlength=4).tolist()
    for expert, moment in enumerate(found.each()):
        rows = value.flatten(0, 2)[indices.flatten() == expert].double()
        torch.testing.assert_close(moment, rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_too_few_tokens_take_the_moment_of_the_layer(mixture, monkeypatch):
    """Also where moments are taken for one expert at a time."""
    *_, value, _ = mixture
    monkeypatch.setattr("resq_compiler.calibration.expert_moments.ROOM", 1)
    found = moments(mixture, least=10**6)
    counts, rows = found.count(), value.flatten(0, 2).double()
    assert not any(found.own())
    for moment in found.each():
        torch.testing.assert_close(moment, rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)
    report = ExpertReport(counts, found.own())
    assert report.tokens() == " ".join(f"{n}*" for n in counts)
    assert describe({"down": report})[-1] == f"tokens of the experts of down: {report.tokens()}"


def test_every_token_through_every_expert_is_a_second_copy_of_the_graph(mixture):
    gm, _, experts, x, value, indices = mixture
    before = [n.name for n in gm.graph.nodes]
    everywhere, numbers = on_every_expert(x, experts)
    env = executor.first_tokens(gm, IDS)
    executor.Schedule(gm, [everywhere, numbers], env).run(env)
    assert torch.equal(env[numbers], every_expert(indices, 4))
    assert env[everywhere].shape == (3, 16, 4, value.shape[-1])
    chosen = env[everywhere].gather(2, indices.view(3, 16, 2, 1).expand(-1, -1, -1, value.shape[-1]))
    torch.testing.assert_close(chosen, value)
    gm.graph.eliminate_dead_code()
    assert [n.name for n in gm.graph.nodes] == before


def test_sizes_of_channels_by_expert(mixture):
    *_, value, indices = mixture
    energy = ExpertEnergy("down", 4)
    energy.route(indices)
    energy.update(value)
    rows = value.flatten(0, 2)
    expected = torch.stack([rows[indices.flatten() == i].square().sum(0).double() for i in range(4)])
    torch.testing.assert_close(energy.sizes(1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(energy.sizes(10**6), energy.whole.sizes.expand(4, -1))
    again = ExpertEnergy("down", 4)
    again.restore(energy.state())
    assert torch.equal(again.sizes(1), energy.sizes(1))
