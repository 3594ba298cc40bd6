from __future__ import annotations

import pytest
import torch

from resq_compiler import calibration
from resq_compiler.calibration import Bases, make_bases, needs_moments, permutation
from resq_compiler.errors import DataError
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.recipes import resolve
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


def test_moments_are_those_of_the_eager_model(build, tiny):
    """llama: inputs of attention and feed-forward (without the gains, which fold into the weights), values and down inputs."""
    built, model = build("llama", "insert-projections"), tiny("llama")
    seen, moments = hooked(model, tiny_tokens(4, 32)), built.ctx.moments
    pooled = torch.zeros(64, 64, dtype=torch.float64)
    for i, layer in enumerate(model.model.layers):
        for norm, linear in (
            (layer.input_layernorm, "self_attn.q_proj"),
            (layer.post_attention_layernorm, "mlp.up_proj"),
        ):
            x = seen[f"model.layers.{i}.{linear}"] / norm.weight.detach()
            pooled += x.T @ x / (4 * 128)  # four sites of 128 tokens
        v = seen[f"model.layers.{i}.self_attn.v_proj"] @ layer.self_attn.v_proj.weight.detach().double().T
        for head, mean in enumerate(moments.value[i].mean()):
            part = v[:, 16 * head : 16 * head + 16]
            torch.testing.assert_close(mean, part.T @ part / 128, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.residual.mean(), pooled, rtol=1e-4, atol=1e-5)  # float32 activations
    down = built.ctx.topology.blocks[1].feed_forwards[0].down
    x = seen["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(moments.down_energy[down], x.square().sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.down_peak[down].double(), x.abs().amax(0), rtol=1e-4, atol=1e-6)


def test_keys_are_taken_after_rope(build, tiny):
    """Against what the eager model writes into its own cache, pooled over heads."""
    built = build("llama", "insert-projections")
    with torch.no_grad():
        cache = tiny("llama")(tiny_tokens(4, 32), use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        keys = layer.keys.transpose(0, 3).flatten(1).double()  # [16, everything]
        torch.testing.assert_close(built.ctx.moments.key[i].mean(), keys @ keys.T / keys.shape[1], rtol=1e-4, atol=1e-5)


def gaussian_moments(built, spectrum: torch.Tensor):
    """Moments of a zero-mean Gaussian with known covariance Q diag(spectrum) Qᵀ, for the residual stream; real ones elsewhere."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(20000, 64, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ q.T
    moment = SecondMoment("gaussian", 64)
    moment.update(x.float())
    return q, calibration.Moments(moment, built.ctx.moments.value, built.ctx.moments.key)


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal", "none"])
def test_u_a_spans_the_top_eigenvectors_of_a_known_covariance(rotation, build):
    """The last 1/8 of the columns, whatever the rotation inside the part: the projector is the closed form."""
    built = build("llama", "insert-projections")
    spectrum = torch.cat((torch.linspace(0.1, 1, 56), torch.linspace(10, 20, 8)))
    q, moments = gaussian_moments(built, spectrum)
    bases = make_bases(moments, built.ctx.topology, resolve("resq", rotation=rotation))
    high = bases.residual[:, 56:]
    error = torch.linalg.matrix_norm(high @ high.T - q[:, 56:] @ q[:, 56:].T, 2)
    assert error < 0.05  # sampling: angle ~ sqrt(64 / 20000) * sqrt(1 * 10) / (10 - 1) = 0.02
    assert (torch.linalg.matrix_norm(high @ high.T - q[:, :8] @ q[:, :8].T, 2)) > 0.9  # and not the bottom ones
    torch.testing.assert_close(bases.spectra["residual"], spectrum.double(), rtol=0.1, atol=0.1)  # ascending, sampled


def test_three_parts_keep_their_subspaces(build):
    built = build("llama", "insert-projections")
    spectrum = torch.cat((torch.full((16,), 0.01), torch.full((40,), 1.0), torch.full((8,), 30.0)))
    q, moments = gaussian_moments(built, spectrum)
    u = make_bases(moments, built.ctx.topology, resolve("resq", low_fraction=0.25)).residual
    for start, stop in ((0, 16), (16, 56), (56, 64)):
        error = torch.linalg.matrix_norm(
            u[:, start:stop] @ u[:, start:stop].T - q[:, start:stop] @ q[:, start:stop].T, 2
        )
        assert error < 0.05  # as above


def test_quik_orders_channels_by_peak(build):
    built = build("llama", "insert-projections", recipe="quik")
    u, peak = built.ctx.bases.residual, built.ctx.moments.residual_peak
    assert set(u.unique().tolist()) == {0.0, 1.0} and bool((peak.double() @ u).diff().ge(0).all())


def test_quarot_needs_no_data_and_flattens_a_spike(build):
    built = build("llama", "insert-projections", recipe="quarot")
    assert built.ctx.moments is None
    assert not needs_moments(resolve("quarot")) and needs_moments(resolve("resq")) and needs_moments(resolve("quik"))
    assert needs_moments(resolve("rtn", down_proj="energy-split")) and not needs_moments(resolve("rtn"))
    spike = torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor([5]), 1.0)
    torch.testing.assert_close((spike @ built.ctx.bases.residual).abs(), torch.full((64,), 1 / 8, dtype=torch.float64))


def test_no_basis():
    assert make_bases(None, None, resolve("rtn")) == Bases()


def test_permutation_sorts_ascending():
    size = torch.tensor([3.0, 1.0, 2.0])
    assert torch.equal(size.double() @ permutation(size), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("site", ["mlp.up_proj", "self_attn.v_proj"])
def test_activations_that_overflow_are_named(site, build, captured):
    """Weights are finite and calibration is not: 1e30 squared leaves float32."""
    from resq_compiler import graph_tools

    built = build("llama", "compute-bases")
    node = next(n for n in built.gm.graph.find_nodes(op="get_attr") if f"layers.0.{site}" in str(n.target))
    graph_tools.set_tensor(built.gm, str(node.target), graph_tools.get_tensor(built.gm, node) * 1e30)
    with pytest.raises(DataError, match=r"(node \w+|block 0 values|residual stream)"):
        calibration.calibrate(built.gm, built.ctx)
