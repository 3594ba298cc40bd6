"""Against what it stands for: small errors put into the values of a site, and how far predictions then move."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.analysis import sensitivity
from resq_compiler.analysis.sites import Site
from resq_compiler.calibration import executor
from resq_compiler.errors import DataError
from resq_compiler.ir import graph_tools
from resq_compiler.numerics.seeds import generator

SHARE = 1e-4  # of the energy of a value: small enough for the second derivative to be all, large enough for float32
SITES = (Site("attention"), Site("mlp"), Site("o", 1), Site("down", 0), Site("key", 0), Site("value", 1))


def measure(built, seed: int = 0) -> dict[Site, torch.Tensor]:
    return sensitivity.measure(built.gm, built.topology, built.ctx.windows, seed, built.ctx.progress)


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
