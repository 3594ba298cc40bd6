from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import ComputeBases, ReorderChannels, RotateBases

from resq_compiler.analysis.amplification import residual_readers, value_readers, weigh
from resq_compiler.analysis.sites import Site
from resq_compiler.calibration import requests
from resq_compiler.calibration.bases import Bases, permutation
from resq_compiler.calibration.statistics import Request, Statistics, spread, take
from resq_compiler.errors import DataError
from resq_compiler.ir import meta, ops
from resq_compiler.numerics.basis import SecondMoment, principal_basis
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.tiny import tiny_tokens


@torch.no_grad()
def hooked(model, tokens) -> dict[str, torch.Tensor]:
    """Inputs of the eager model's linears, [tokens, width]; the gain of the norm before is divided out by the caller."""
    seen: dict = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].flatten(0, -2).double()}))
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def taken(built, wanted):
    """Statistics of the graph as it is, on the calibration windows."""
    return take(built.gm, wanted, built.ctx.windows, None, built.ctx.progress)


def test_moments_are_those_of_the_eager_model(build, tiny):
    """llama: inputs of attention and feed-forward (without the gains, which fold into the weights), values and down inputs."""
    built, model = build("llama", "reorder-channels", recipe="resq+", allocation="equal"), tiny("llama")
    seen, found = hooked(model, tiny_tokens(4, 32)), built.seen
    pooled = torch.zeros(64, 64, dtype=torch.float64)
    for i, layer in enumerate(model.model.layers):
        for norm, linear in (
            (layer.input_layernorm, "self_attn.q_proj"),
            (layer.post_attention_layernorm, "mlp.up_proj"),
        ):
            x = seen[f"model.layers.{i}.{linear}"] / norm.weight.detach()
            pooled += x.T @ x / (4 * 128)  # four sites of 128 tokens
        v = seen[f"model.layers.{i}.self_attn.v_proj"] @ layer.self_attn.v_proj.weight.detach().double().T
        for head, mean in enumerate(found.get(SecondMoment, Site("value", i)).mean()):
            part = v[:, 16 * head : 16 * head + 16]
            torch.testing.assert_close(mean, part.T @ part / 128, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.get(SecondMoment, requests.RESIDUAL).mean(), pooled, rtol=1e-4, atol=1e-5
    )  # float32 activations
    x, down = seen["model.layers.1.mlp.down_proj"], Site("down", 1)
    found = taken(built, [*requests.down_sizes(built.topology, "energy"), *requests.down_sizes(built.topology, "peak")])
    torch.testing.assert_close(found.get(Energy, down).sizes, x.square().sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.get(Peak, down).sizes.double(), x.abs().amax(0), rtol=1e-4, atol=1e-6)


def test_keys_are_taken_after_rope(build, tiny):
    """Against what the eager model writes into its own cache, pooled over heads."""
    built = build("llama", "rotate-bases")
    with torch.no_grad():
        cache = tiny("llama")(tiny_tokens(4, 32), use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        keys = layer.keys.transpose(0, 3).flatten(1).double()  # [16, everything]
        torch.testing.assert_close(
            built.seen.get(SecondMoment, Site("key", i)).mean().mean(0),
            keys @ keys.T / keys.shape[1],
            rtol=1e-4,
            atol=1e-5,
        )


def test_bases_see_some_of_the_windows_evenly(build):
    windows = torch.arange(40).reshape(10, 4)
    chosen = [spread(windows, n)[:, 0].tolist() for n in (1, 4, 10, 99)]
    assert chosen == [[0], [0, 8, 20, 28], list(range(0, 40, 4)), list(range(0, 40, 4))]
    built = build("llama", "rotate-bases", basis_samples=2)
    values, pooled = (built.seen.get(SecondMoment, site) for site in (Site("value", 0), requests.RESIDUAL))
    assert values.tokens == 2 * 32 and pooled.tokens == 2 * 32 * 2 * len(built.topology.blocks)
    assert "calibration: bases and channel order from 2 of 4 windows (basis_samples)" in built.ctx.notes


def test_block_pca_puts_more_energy_last_than_channels_do(build, tiny):
    """The last 1/8 of what the transform reads, in the eager model's values: eigenvalues majorize a diagonal."""
    built, seen = build("llama", "insert-projections", down_proj="block-pca"), hooked(tiny("llama"), tiny_tokens(4, 32))
    shares = []
    for i, basis in enumerate(built.bases.down.values()):
        u, order = basis.vectors, basis.order
        x = seen[f"model.layers.{i}.mlp.down_proj"]
        torch.testing.assert_close(
            u.mT @ u, torch.eye(u.shape[-1], dtype=torch.float64).expand_as(u), rtol=0, atol=1e-10
        )
        energy = ops.project_blocks(x, u, order).square().sum(0)
        assert bool((energy.diff() > -1e-4 * energy.max()).all())  # ascending; moments are sums of float32
        plain = x.square().sum(0).sort().values
        shares.append((energy[-20:].sum() / energy.sum(), plain[-20:].sum() / plain.sum()))
    assert len(shares) == 2 and all(ours > channels for ours, channels in shares)


def gaussian_bases(built, spectrum: torch.Tensor):
    """Put bases from moments of a zero-mean Gaussian of covariance Q diag(spectrum) Qᵀ for the stream, real ones elsewhere; Q."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(20000, 64, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ q.T
    moment = SecondMoment("gaussian", 64)
    moment.update(x.float())
    heads = requests.head_moments(built.topology)
    for request in heads:
        request.statistic.restore(built.seen.get(SecondMoment, request.site).state())
    built.ctx.facts.put(Statistics([Request(requests.RESIDUAL, moment, ()), *heads]))
    ComputeBases().run(built.gm, built.ctx)
    return q


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal", "none"])
def test_u_a_spans_the_top_eigenvectors_of_a_known_covariance(rotation, build):
    """The last 1/8 of the columns, whatever the rotation inside the part: the projector is the closed form."""
    built = build("llama", "rotate-bases")
    spectrum = torch.cat((torch.linspace(0.1, 1, 56), torch.linspace(10, 20, 8)))
    q = gaussian_bases(built, spectrum)
    if rotation != "none":
        RotateBases(rotation).run(built.gm, built.ctx)
    high = built.bases.residual[:, 56:]
    error = torch.linalg.matrix_norm(high @ high.T - q[:, 56:] @ q[:, 56:].T, 2)
    assert error < 0.05  # sampling: angle ~ sqrt(64 / 20000) * sqrt(1 * 10) / (10 - 1) = 0.02
    assert (torch.linalg.matrix_norm(high @ high.T - q[:, :8] @ q[:, :8].T, 2)) > 0.9  # and not the bottom ones


def test_three_parts_keep_their_subspaces(build):
    built = build("llama", "rotate-bases", low_fraction=0.25)
    spectrum = torch.cat((torch.full((16,), 0.01), torch.full((40,), 1.0), torch.full((8,), 30.0)))
    q = gaussian_bases(built, spectrum)
    RotateBases().run(built.gm, built.ctx)
    u = built.bases.residual
    for start, stop in ((0, 16), (16, 56), (56, 64)):
        error = torch.linalg.matrix_norm(
            u[:, start:stop] @ u[:, start:stop].T - q[:, start:stop] @ q[:, start:stop].T, 2
        )
        assert error < 0.05  # as above


def test_quik_orders_channels_by_peak(build):
    built = build("llama", "reorder-channels", recipe="quik")
    u, peak = built.bases.residual, built.seen.get(Peak, requests.RESIDUAL).sizes
    assert set(u.unique().tolist()) == {0.0, 1.0} and bool((peak.double() @ u).diff().ge(0).all())


def test_where_u_a_stays_online_every_value_has_the_basis_of_its_own_moments(build, tiny):
    """olmo2: linears read the stream itself; the last columns of each basis span the top eigenvectors of what that linear reads."""
    built, seen = build("olmo2", "insert-projections", recipe="resq"), hooked(tiny("olmo2"), tiny_tokens(4, 32))
    assert built.bases.residual is None and len(built.bases.reading) == 4
    names = [f"model.layers.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.q_proj", "mlp.up_proj")]
    for name, u in zip(names, built.bases.reading.values(), strict=True):
        top = torch.linalg.eigh(seen[name].T @ seen[name])[1][:, 56:]
        high = u[:, 56:]
        torch.testing.assert_close(high @ high.T, top @ top.T, rtol=0, atol=1e-3)  # float32 activations


def test_where_u_a_stays_online_one_basis_may_serve_all(build):
    """Of the pooled moments of what linears read, and one matrix in the graph; the stage says what both cost."""
    own, shared = (build("gemma2", "partition-linears", online_basis=online) for online in ("own", "shared"))
    bases = list(shared.bases.reading.values())
    assert len(bases) == 4 and all(u is bases[0] for u in bases)
    before = [build("gemma2", "rotate-bases", online_basis=online).seen for online in ("own", "shared")]
    moments = [before[0].get(SecondMoment, Site("reader", index=i)).mean() for i in range(4)]
    pooled = before[1].get(SecondMoment, Site("reader")).mean()
    torch.testing.assert_close(pooled, torch.stack(moments).mean(0), rtol=1e-5, atol=1e-6)
    counts = []
    for built in (own, shared):
        nodes = [n for n in built.gm.graph.nodes if (f := meta.get(n, meta.Projection)) and f.basis == "U_A"]
        counts.append((len(nodes), len({n.args[1] for n in nodes})))
        (line,) = [line for stage in built.pipeline.stages for line in stage.lines if line.startswith("U_A online")]
        assert (
            f"before 4 inputs of linears: {counts[-1][1]} matrices of 64²" in line and "16,384 multiplications" in line
        )
    assert counts == [(4, 4), (4, 1)]


def test_u_a_online_sees_values_with_their_gains(build, tiny):
    """gemma2: moments are those of the norm's output as the linears of the model read it."""
    built, seen = build("gemma2", "rotate-bases"), hooked(tiny("gemma2"), tiny_tokens(4, 32))
    x = seen["model.layers.1.mlp.up_proj"]
    moment = built.seen.get(SecondMoment, Site("reader", index=3)).mean()
    torch.testing.assert_close(moment, x.T @ x / 128, rtol=1e-4, atol=1e-5)


def test_quarot_needs_no_data_and_flattens_a_spike(build):
    built = build("llama", "insert-projections", recipe="quarot")
    assert built.ctx.facts.find(Statistics) is None
    assert (
        not ComputeBases("hadamard").needs_calibration and ComputeBases("hadamard", down="block-pca").needs_calibration
    )
    assert ComputeBases("pca").needs_calibration and ComputeBases("outliers").needs_calibration
    spike = torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor([5]), 1.0)
    torch.testing.assert_close((spike @ built.bases.residual).abs(), torch.full((64,), 1 / 8, dtype=torch.float64))


def test_no_basis(build):
    built = build("llama", "plan-columns")
    ComputeBases("none").run(built.gm, built.ctx)
    assert built.bases == Bases()


def test_permutation_sorts_ascending():
    size = torch.tensor([3.0, 1.0, 2.0])
    assert torch.equal(size.double() @ permutation(size), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("site", ["mlp.up_proj", "self_attn.v_proj"])
def test_activations_that_overflow_are_named(site, build, captured):
    """Weights are finite and calibration is not: 1e30 squared leaves float32."""
    from resq_compiler.ir import graph_tools

    built = build("llama", "compute-bases")
    node = next(n for n in built.gm.graph.find_nodes(op="get_attr") if f"layers.0.{site}" in str(n.target))
    graph_tools.set_tensor(built.gm, str(node.target), graph_tools.get_tensor(built.gm, node) * 1e30)
    with pytest.raises(DataError, match=r"(node \w+|block 0 values|residual stream).*finite|overflow"):
        built.pipeline.run(built.gm, [ComputeBases(), ReorderChannels()])


def test_queries_are_counted_with_the_key_head_they_meet(build, tiny):
    """Against q_proj of the eager model with transformers' own rotary embedding: mean over tokens and the head's queries."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    built, model, tokens = build("llama", "rotate-bases"), tiny("llama"), tiny_tokens(4, 32)
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[0]
        layer = model.model.layers[0]
        q = layer.self_attn.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, 16)).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(32)[None])
        q = apply_rotary_pos_emb(q, q, cos, sin)[0].double()
    heads = q.shape[1] // 2
    for group, mean in enumerate(built.seen.get(SecondMoment, Site("query", 0)).mean()):
        rows = q[:, heads * group : heads * (group + 1)].flatten(0, 2)
        torch.testing.assert_close(mean, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)  # float32 activations


def test_readers_raise_the_directions_they_amplify():
    """A direction without variance, but read by a large weight, moves from the last eigenvectors to the first."""
    moment = torch.diag(torch.tensor([1e-3, 1.0, 1.0, 1.0], dtype=torch.float64))
    readers = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert int(principal_basis(moment)[0][:, -1].abs().argmax()) != 0
    assert int(principal_basis(weigh(moment, readers))[0][:, -1].abs().argmax()) == 0
    assert torch.allclose(weigh(7 * moment, readers), weigh(moment, 5 * readers))  # scales do not matter


def test_readers_of_the_stream_and_of_values_are_the_models_own_weights(build, tiny):
    built, layers = build("llama", "insert-projections"), tiny("llama").model.layers
    gm, topology = build("llama", "compute-bases").gm, build("llama", "compute-bases").topology
    total = torch.zeros(64, 64, dtype=torch.float64)
    for layer in layers:
        for gain, linears in (
            (layer.input_layernorm.weight, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm.weight, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            for linear in linears:
                w = (linear.weight * gain).detach().double()
                total += w.T @ w
    torch.testing.assert_close(residual_readers(gm, topology.readers), total, rtol=1e-4, atol=1e-5)  # float32 products
    o = layers[1].self_attn.o_proj.weight.detach().double()  # 4 query heads of 16, 2 key/value heads
    found = value_readers(gm, [topology.blocks[1].attention])
    for g in range(2):
        expected = sum(o[:, 16 * h : 16 * h + 16].T @ o[:, 16 * h : 16 * h + 16] for h in (2 * g, 2 * g + 1))
        torch.testing.assert_close(found[g], expected, rtol=1e-6, atol=1e-9)
    assert built.bases.key[0].shape == (16, 16)


def test_a_key_basis_for_each_head(build):
    built = build("llama", "quantize-weights", key_basis="head", basis_weighting="readers")
    u = built.bases.key[0]
    assert u.shape == (2, 16, 16)
    torch.testing.assert_close(u.mT @ u, torch.eye(16, dtype=torch.float64).expand_as(u), rtol=0, atol=1e-10)
    assert (
        max(s.max_error or 0 for s in built.pipeline.stages) < 1e-5
    )  # float32 rounding: the exact passes stayed exact
