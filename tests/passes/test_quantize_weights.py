from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from resq_compiler.passes import QuantizeWeights
from resq_compiler.passes.quantize_weights import find_sites, input_moment, source_of, written_stream

import resq_compiler
from resq_compiler.calibration import executor, lockstep, precision, workdir
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.ir import graph_tools, meta, ops, promises
from resq_compiler.ir.linears import whole_value
from resq_compiler.ir.views import Linear
from resq_compiler.numerics import gptq as gptq_core
from resq_compiler.numerics import weights as weight_core
from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.weights import quantize_weight_rtn
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from resq_compiler.util import memory

PLAIN = {"recipe": "gptq"}  # no change of basis: weights are the model's own, and gains stay with the values


def coded(gm) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(codes, scale) of every part, by the name of its module and its index."""
    found = {}
    for node in gm.graph.nodes:
        if node.target in (ops.quantized_linear, ops.weight_only_linear):
            fact = meta.get(node, meta.LinearPart)
            found[f"{fact.site.name}.{fact.index}"] = tuple(graph_tools.get_tensor(gm, n) for n in node.args[1:3])
    return found


def test_rewrites(build):
    built = build("llama", "quantize-weights")
    assert QuantizeWeights().run(built.gm, built.ctx) == 14
    found = coded(built.gm)
    assert len(found) == 26
    for name, (codes, scale) in found.items():
        high = name.endswith(".1")
        limit = 128 if high else 8
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        assert -limit <= int(codes.min()) and int(codes.max()) < limit
    assert not [n for n, _ in built.gm.named_buffers() if ".part" in n and n.endswith("weight")]  # float ones released


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_groups_have_scales_of_their_own(method, build):
    """Also behind quantize-activations; and what is saved and loaded computes the same (tests/storage)."""
    built = build("llama", weight_group_size=32, weight_method=method)
    for name, (codes, scale) in coded(built.gm).items():
        assert scale.shape == (len(codes), -(-codes.shape[1] // 32)), name
    nodes = [n for n in built.gm.graph.nodes if n.target is ops.quantized_linear]
    assert all(n.kwargs == {"group_size": 32} for n in nodes) and len(nodes) == 26


@torch.no_grad()
def module_inputs(model, names, tokens) -> dict[str, torch.Tensor]:
    """Inputs of the model's own modules, caught by hooks: [tokens, in_features]."""
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[n].register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].flatten(0, -2)}))
        for n in names
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"gptq_act_order": True}, {"weight_clip": "hessian"}, {"weight_clip": "max"}], ids=str
)
def test_gptq_gets_the_codes_of_gptq_on_moments_caught_by_hooks(options, build, tiny):
    """Block 0, q, k and v: their input is float in both worlds. Codes may differ where a weight is on a rounding edge."""
    built = build("llama", "quantize-activations", **PLAIN, **options)
    found = coded(built.gm)
    model = tiny("llama")
    layer, names = model.model.layers[0], [f"model.layers.0.self_attn.{r}_proj" for r in "qkv"]
    x = module_inputs(model, names, tiny_tokens(4, 32))[names[0]]
    moment = x.double().T @ x.double()
    weight = torch.cat([getattr(layer.self_attn, f"{r}_proj").weight.detach() for r in "qkv"])
    clip = {"weight_clip": "mse", **options}["weight_clip"]
    expected = gptq_core.gptq(
        weight, moment, [Part(4, 0, 64)], act_order=options.get("gptq_act_order", False),
        clip="max" if clip == "max" else "mse", weighted_clip=clip == "hessian",
    ).parts[0]  # fmt: skip
    codes = torch.cat([found[f"{n}.0"][0] for n in names])
    scale = torch.cat([found[f"{n}.0"][1] for n in names])
    torch.testing.assert_close(scale, expected.scale, rtol=1e-5, atol=0)  # float32 products in another order
    assert (codes != expected.qdata).float().mean() < 0.01  # 1 %: rounding edges, and the columns after them


def test_rtn_is_the_search_on_the_models_own_weight(build, tiny):
    built = build("llama", "quantize-activations", recipe="rtn")
    weight = tiny("llama").model.layers[1].mlp.down_proj.weight.detach()
    (expected,) = quantize_weight_rtn(weight, [Part(4, 0, 160)])
    codes, scale = coded(built.gm)["model.layers.1.mlp.down_proj.0"]
    assert torch.equal(codes, expected.qdata) and torch.equal(scale, expected.scale)


def test_lm_head_is_rounded_some_rows_at_a_time(captured, tiny, monkeypatch):
    """The codes are those of the whole matrix, and no more of it is made at once."""

    def compiled(rows):
        monkeypatch.setattr(promises, "ROWS", rows)
        monkeypatch.setattr(weight_core, "ROWS", rows)
        with mock.patch.object(weight_core, "quantize_weight_rtn", wraps=weight_core.quantize_weight_rtn) as rounds:
            model = resq_compiler.compile(
                tiny("llama"),
                tiny_tokens(2, 24),
                recipe="resq",
                weight_method="rtn",
                lm_head_bits=8,
                calibration_length=24,
            )
        return model.graph_module, [len(call.args[0]) for call in rounds.call_args_list]

    monkeypatch.setattr(promises, "TABLE", 131 * 64 * 4)
    (whole, _), (pieces, counts) = compiled(131), compiled(50)
    assert counts[-3:] == [50, 50, 31]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, pieces.state_dict()[name]), name


def test_leaves_alone(build):
    """W16: not in the pipeline. Weights of other linears than partitioned ones, lm_head here, stay as they are."""
    assert "quantize-weights" not in [s.name for s in build("llama", weight_bits=16).pipeline.stages]
    built = build("llama", "quantize-activations", recipe="rtn")
    head = [n for n in built.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)]
    assert len(head) == 1 and graph_tools.get_tensor(built.gm, head[0].args[1]).dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"recipe": "rtn", "weight_clip": "max"}, {"weight_method": "rtn", "weight_clip": "max"}], ids=str
)
def test_numerics(options, build):
    """Without clipping, rounding to nearest moves no weight by more than half a step."""
    before = build("llama", "quantize-weights", **options)
    weights = {n: t.clone() for n, t in before.gm.named_buffers() if ".part" in n}
    before.pipeline.run(before.gm, before.rest[:1])
    for name, (codes, scale) in coded(before.gm).items():
        module, _, index = name.rpartition(".")
        error = (codes.float() * scale[:, None] - weights[f"{module}.part{index}.weight"]).abs()
        assert bool((error <= 0.5001 * scale[:, None]).all())  # half a step and float32 rounding


def test_gptq_lowers_the_output_error_and_raises_the_weight_error(build, tiny):
    """On the calibration data itself, which is what GPTQ minimizes over."""
    noise, tokens = {}, tiny_tokens(4, 32)
    with torch.no_grad():
        reference = tiny("llama")(tokens).logits
    for method in ("rtn", "gptq"):
        built = build("llama", "quantize-activations", weight_method=method)
        facts = [meta.get(n, meta.WeightNoise) for n in built.gm.graph.nodes]
        env = executor.first_tokens(built.gm, tokens)
        logits = graph_tools.output_args(built.gm.graph)[0]
        executor.Schedule(built.gm, [logits], env).run(env)
        noise[method] = (sum(f.relative for f in facts if f), relative_error(env[logits], reference))
    assert noise["gptq"][0] > noise["rtn"][0] and noise["gptq"][1] < noise["rtn"][1]


def test_quantized_activations_change_what_gptq_sees(build):
    first = coded(build("llama", "quantize-activations").gm)
    second = coded(build("llama", gptq_on_quantized_activations=True).gm)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[k][0], second[k][0]) for k in first)


@pytest.mark.parametrize("options", [{}, {"weight_method": "rtn"}], ids=str)
def test_idempotent(options, build):
    built = build("llama", "quantize-activations", **options)
    assert QuantizeWeights().run(built.gm, built.ctx) == 0


def test_tokens_can_count_relative_to_the_residual_stream(build):
    """Layers that write into the stream: the moment of x / rms(stream after it). Others: a plain moment, as no norm divides it."""
    built = build("llama", "quantize-weights")
    start, end = built.topology.blocks[0].start, built.topology.blocks[0].end
    sites = {s.fact.role: s for s in find_sites(built.gm) if s.fact.block == 0}
    streams = {role: written_stream([site], built.topology) for role, site in sites.items()}
    assert streams["down"] is end and streams["o"] not in (None, end)
    assert all(streams[role] is None for role in ("q", "k", "v", "gate", "up"))
    windows = list(tiny_tokens(4, 32).split(2))
    for role in ("o", "down"):
        inputs, stream = list(source_of(sites[role])), streams[role]
        found = input_moment(sites[role], inputs, stream, Lockstep.begin(built.gm, windows, start), end)
        env = executor.first_tokens(built.gm, tiny_tokens(4, 32))
        executor.Schedule(built.gm, [*inputs, stream], env).run(env)
        x, r = torch.cat([env[n] for n in inputs], -1).flatten(0, 1).double(), env[stream].flatten(0, 1).double()
        x = x / r.square().mean(-1, keepdim=True).sqrt()
        assert relative_error(found, x.T @ x / len(x)) < 1e-6  # products in float32


def test_columns_of_a_value_are_the_value(build):
    """Where a moment looks at all of them, in order; some of them, or values side by side for another reason, stay as they are."""
    built = build("llama", "quantize-weights", down_proj="energy-split")
    roles = {s.fact.role: list(source_of(s)) for s in find_sites(built.gm) if s.fact.block == 0}
    env = executor.first_tokens(built.gm, tiny_tokens(2, 16))
    for role in ("q", "gate", "down"):
        parts, (value,) = roles[role], whole_value(roles[role])
        assert len(parts) == 2 and value is parts[0].args[0]
        executor.Schedule(built.gm, [value, *parts], env).run(env)
        assert torch.equal(torch.cat([env[part] for part in parts], -1), env[value])
        for others in (parts[:1], parts[1:], parts[::-1], [parts[0], value]):
            assert whole_value(others) is others
    assert whole_value(roles["o"]) is roles["o"], "heads are merged behind their columns"


def test_token_weighting_changes_layers_that_write_into_the_stream(build):
    plain = coded(build("llama", "quantize-activations").gm)
    weighted = coded(build("llama", "quantize-activations", gptq_token_weighting="residual").gm)
    different = {name for name in plain if not torch.equal(plain[name][0], weighted[name][0])}
    assert {name for name in different if "layers.0" in name and "o_proj" not in name and "mlp" not in name} == set()
    assert any("0.self_attn.o_proj" in name for name in different) and any(
        "0.mlp.down_proj" in name for name in different
    )


ROOM_FOR_SOME = 0.5  # residual streams: less than the values of all windows, more than those of one


ROOMS = [
    {},
    {"gptq_on_quantized_activations": True},
    {"gptq_token_weighting": "residual"},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", ROOMS, ids=str)
def test_values_that_are_computed_again_change_nothing(options, dtype, build, monkeypatch, tmp_path):
    """With room for nothing every stretch of a block starts at its start; with room for all, or files, none does: the same bits.

    In between some batches keep their values and others don't.
    """
    found, runs, totals = [], [], []
    monkeypatch.setattr(executor, "TOKENS_PER_BATCH", 1)  # one window in each
    monkeypatch.setattr(memory, "WORTH_A_FILE", 1)  # no value is too small for a file
    plain = executor.Stretch.run
    monkeypatch.setattr(executor.Stretch, "run", lambda self, env: (runs.append(len(self.order)), plain(self, env))[1])
    for room, work in ((0.0, None), (ROOM_FOR_SOME, None), (1e9, None), (0.0, workdir.WorkDirectory(tmp_path, {}))):
        built = build("llama", "quantize-weights", **options)
        monkeypatch.setattr(lockstep, "ROOM", room)
        with precision.linears_in(dtype):
            QuantizeWeights().run(built.gm, dataclasses.replace(built.ctx, work=work))
        found.append(coded(built.gm))
        totals.append(sum(runs))
        runs.clear()
    assert totals[0] > totals[1] > totals[2] == totals[3]
    for other in found[1:]:
        assert found[0].keys() == other.keys() and len(other) == 26
        assert all(torch.equal(a, b) for name in other for a, b in zip(found[0][name], other[name], strict=True))


def test_the_stream_is_weighed_with_the_weights_that_gptq_takes(build):
    """Linears that write into the stream run before they have codes, too: their weights are made once for both."""
    gm, ctx = (built := build("llama", "quantize-weights", double=False)).gm, built.ctx
    reads: dict[str, int] = {}

    def promised(name: str, value: torch.Tensor) -> promises.Promised:
        def read(start: int, stop: int) -> torch.Tensor:
            reads[name] = reads.get(name, 0) + (start == 0)
            return value[start:stop]

        return promises.Promised(promises.Stored(value.shape, value.dtype, read))

    for site in find_sites(gm):
        for weight in (Linear.require(node).weight for node in site.nodes):
            graph_tools.set_tensor(gm, str(weight.target), promised(str(weight.target), graph_tools.held(gm, weight)))
    QuantizeWeights(token_weighting="residual").run(gm, ctx)
    assert sum(".o_proj." in name or ".down_proj." in name for name in reads) == 6  # o in two parts
    assert {name: count for name, count in reads.items() if count > 1} == {}


def test_cheap_values_are_not_kept(build):
    gm = build("llama", "quantize-weights").gm
    norm = gm.graph.find_nodes(op="call_function", target=ops.rms_norm)[1]
    stream = norm.args[0]
    assert lockstep.not_cheap({norm, stream}, set()) == {stream}
    assert lockstep.not_cheap({norm}, set()) == {norm} and lockstep.not_cheap({norm}, {stream}) == set()
