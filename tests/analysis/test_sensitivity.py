"""Against what it stands for: small errors put into the values of a site, and how far predictions then move."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import Canonicalize, FindTopology, NameAttention, SplitFused

from resq_compiler.analysis import sensitivity
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import executor
from resq_compiler.errors import DataError
from resq_compiler.frontend.capture import capture_promised
from resq_compiler.frontend.opened import of_instance
from resq_compiler.frontend.source import ModelSource
from resq_compiler.ir import graph_tools, promises
from resq_compiler.numerics.seeds import generator
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.tiny import tiny_model, tiny_tokens

SHARE = 1e-4  # of the energy of a value: small enough for the second derivative to be all, large enough for float32
SITES = (Site("attention"), Site("mlp"), Site("o", 1), Site("down", 0), Site("key", 0), Site("value", 1))


def measure(built, seed: int = 0) -> dict[Site, torch.Tensor]:
    return sensitivity.measure(built.gm, built.topology, built.ctx.windows, seed, built.ctx.progress).moments


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt"])
def measured(request, build):
    """A float graph, and its weighted moments as means of 32 draws."""
    built = build(request.param, before="compute-bases", double=False)
    rounds = []
    for seed in range(32):
        rounds.append(measure(built, seed))
    return built, {site: torch.stack([r[site] for r in rounds]).mean(0) for site in rounds[0]}


def log_p(built, errors: dict) -> torch.Tensor:
    """Log probabilities [n, length, vocabulary], with an error added to the values of some nodes."""
    logits = graph_tools.output_args(built.gm.graph)[0]
    env = executor.first_tokens(built.gm, built.ctx.calibration)
    for node in executor.Schedule(built.gm, [logits], env).order:
        env[node] = graph_tools.run_node(built.gm, node, env)
        if node in errors:
            env[node] = env[node] + errors[node](env[node])
    return env[logits].double().log_softmax(-1)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_small_errors_move_predictions_as_forecast(measured, site):
    built, found = measured
    sites = [
        s for s in found if s == site or (site.block is None and s.name == site.name)
    ]  # of each block where bases are
    places = [place for s in sites for place in sensitivity.places(built.topology)[s]]
    draw, base = generator(0, "test"), log_p(built, {})

    def error(x, groups):
        rows = x if x.dim() == 4 else x.unflatten(-1, (groups, -1))
        noise = torch.randn(rows.shape, generator=draw)
        return (noise * (SHARE * rows.square().mean(-1, keepdim=True)).sqrt()).reshape(x.shape)

    moved = []
    for _ in range(24):
        other = log_p(built, {p.node: lambda x, n=p.groups: error(x, n) for p in places})
        moved.append((base.exp() * (base - other)).sum(-1).mean() / SHARE)
    moment = torch.stack([found[s] for s in sites]).sum(0)
    forecast = moment.sum() if moment.dim() == 2 else moment.diagonal(dim1=-2, dim2=-1).sum()
    assert float(torch.stack(moved).mean() / forecast) == pytest.approx(1, abs=0.15)


def test_gradients_that_are_not_finite_are_told(build, monkeypatch):
    built = build("llama", before="compute-bases", double=False)
    monkeypatch.setattr(sensitivity, "weighted_moment", lambda x, place: torch.full((1, 2, 2), torch.nan))
    with pytest.raises(DataError, match="sensitivity of attention: the gradient is not finite"):
        measure(built)


def at_once(gm, start, ids, nodes, draw):
    """Values and gradients of nodes by one backward pass through the whole graph, from the start of its first block."""
    env = {**executor.shared_values(gm, ids, start), **executor.first_tokens(gm, ids)}
    executor.Schedule(gm, [start, *executor.carried(gm, start)], env).run(env)
    logits = graph_tools.output_args(gm.graph)[0]
    env[start] = env[start].detach().requires_grad_()
    for node in executor.Schedule(gm, [logits], env).order:
        env[node] = graph_tools.run_node(gm, node, env)
        if node in nodes:
            env[node].retain_grad()
    log_p = env[logits].float().log_softmax(-1).flatten(0, -2)
    log_p.gather(-1, torch.multinomial(log_p.detach().exp(), 1, generator=draw)).sum().backward()
    return {node: (env[node].detach(), env[node].grad) for node in nodes}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "olmo2", "gpt_neox"])
def test_block_by_block_is_the_whole_graph_to_the_bit(build, family):
    built = build(family, before="compute-bases", double=False)
    nodes = {p.node for where in sensitivity.places(built.topology).values() for p in where}
    windows, draw = built.ctx.windows.split(1), generator(0, "test")
    expected = [at_once(built.gm, built.topology.blocks[0].start, ids, nodes, draw) for ids in windows]
    seen: dict = {node: [] for node in nodes}
    parts = sensitivity.backward(built.gm, built.topology, windows, nodes, generator(0, "test"), built.ctx.progress)
    for values in parts:
        for node, x in values.items():
            seen[node].append((x.detach(), x.grad))
    for node, found in seen.items():
        assert len(found) == len(windows)
        for (x, gradient), (value, expected_gradient) in zip(found, [e[node] for e in expected], strict=True):
            assert torch.equal(x, value) and torch.equal(gradient, expected_gradient), node


def test_a_block_of_weights_at_a_time():
    opened = of_instance(tiny_model("llama-untied", num_hidden_layers=8), None, "here", ModelSource("instance", ""))
    found = capture_promised(opened.skeleton, opened.weights)
    ctx = PassContext(found.example_inputs, tiny_tokens(4, 32))
    pipeline = Pipeline(ctx)
    pipeline.start(found.graph_module)
    pipeline.run(found.graph_module, [Canonicalize(), NameAttention(), SplitFused(), FindTopology()])
    promises.ledger.reset()
    before = promises.ledger.held
    sensitivity.measure(found.graph_module, ctx.facts.get(Topology), ctx.windows, 0, ctx.progress)
    block = sum(p.nbytes for name, p in opened.weights.items() if ".layers.0." in name)
    assert 0 < promises.ledger.most - before <= 2 * block  # the next one is made while the last is still named
