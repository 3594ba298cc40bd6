"""Runs, gradients and passes on tiny models: one graph, gradients as without blocks, and pairs that leave the float model as it is."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from resq_compiler.passes import LearnRotations, LearnScales

from resq_compiler.calibration import executor
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import ConfigError, PassError
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.promises import Changed, Promised, Stored, in_memory, ledger
from resq_compiler.ir.transforms import TARGETS
from resq_compiler.ir.views import CodedLinear, Quantize, QuantizeDequantize
from resq_compiler.learning.end_to_end import Model, teach
from resq_compiler.learning.holding import hold
from resq_compiler.learning.learned import Learned, may_learn_clip
from resq_compiler.learning.loop import held_back
from resq_compiler.learning.losses import Teacher, TopPredictions, divergence, top_divergence
from resq_compiler.learning.places import Places
from resq_compiler.learning.running import Run
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_tokens
from resq_compiler.util import machine

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order


def logits_of(gm, ids, run=None):
    model = graph_tools.output_args(gm.graph)[0]
    env = executor.first_tokens(gm, ids)
    if run is not None:
        return run.to([model], env)[model]
    executor.Schedule(gm, [model], env).run(env)
    return env[model]


def all_places(built):
    """Everything that can be learned of a graph with float weights."""
    places, learned = Places(built.gm, built.topology, built.plan), Learned()
    assert places.add_stream(learned) is None
    for block in built.topology.blocks:
        places.add_values(learned, block)
        places.add_gains(learned, block)
        places.add_hidden(learned, block)
    return learned


def move(learned, size=0.1):
    """Parameters somewhere else than at their start."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += size * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("recipe", ["resq+", "awq", "prefixquant"])
def test_a_run_is_the_graph(recipe, build):
    """Weights as codes or float, activations dynamic, static or float."""
    built = build("llama", recipe=recipe, activation_clip=0.9, allocation="equal", weight_method="rtn")
    ids = built.ctx.windows[:2]
    torch.testing.assert_close(logits_of(built.gm, ids, Run(built.gm)), logits_of(built.gm, ids), **ROUNDING)


def test_a_run_without_quantizers_is_the_float_graph(build):
    quantized = build("llama", "quantize-weights", gptq_on_quantized_activations=True)
    exact = build("llama", "quantize-activations", gptq_on_quantized_activations=True)
    ids = exact.ctx.windows[:2]
    float_run = Run(quantized.gm, quantized=False)
    torch.testing.assert_close(logits_of(quantized.gm, ids, float_run), logits_of(exact.gm, ids), **ROUNDING)


@pytest.mark.parametrize("options", [{}, {"recipe": "resq+", "allocation": "equal", "activation_clip": 0.9}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox-sequential"])
def test_pairs_leave_the_float_model_as_it_is(family, options, build):
    """Rotations of the stream and of values, scales of norms and hidden channels, in a run and multiplied in, at any parameters."""
    built = build(family, "quantize-activations", double=True, gptq_on_quantized_activations=True, **options)
    ids = built.ctx.windows[:2]
    before = logits_of(built.gm, ids, Run(built.gm, quantized=False))
    learned = all_places(built)
    move(learned)
    learned.begin()
    run = learned.run(built.gm)
    moved = Run(built.gm, quantized=False, tensor=run.tensor, behind=run.behind)
    torch.testing.assert_close(logits_of(built.gm, ids, moved), before, rtol=1e-4, atol=1e-4)  # rotations are float32
    learned.write(built.gm, "test")
    after = logits_of(built.gm, ids, Run(built.gm, quantized=False))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("free", [0, 2**40], ids=["blocks run again", "blocks are kept"])
def test_gradients_by_blocks_are_those_of_the_whole(free, build, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    built = build("llama", "quantize-weights", gptq_on_quantized_activations=True)
    ids = built.ctx.windows[:2]
    learned, model = all_places(built), Model(built.gm, built.topology)
    Places(built.gm, built.topology, built.plan).add_clips(learned, list(built.gm.graph.nodes))
    move(learned, 0.02)
    teacher = [TopPredictions.of(torch.randn(32, 131), 50) for _ in range(2)]

    def gradients(compute):
        learned.zero_grad()
        with torch.enable_grad():
            learned.begin()
            loss = compute(learned.run(built.gm))
            learned.end()
        return loss, {n: p.grad.clone() for n, p in learned.named_parameters()}

    def whole(run):
        logits = logits_of(built.gm, ids, run)
        loss = sum(divergence(logits[i], teacher[i]) for i in range(2)) / 2
        loss.backward()
        return float(loss.detach())

    losses = [lambda logits, i=i: divergence(logits, teacher[i]) for i in range(2)]
    expected, wanted = gradients(whole)
    got, found = gradients(lambda run: model.backward(run, ids, losses))
    assert got == pytest.approx(expected, rel=1e-5) and wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5 + 1e-3 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("found", [divergence, top_divergence])
def test_the_divergence_over_the_top(found):
    """Zero for the teacher itself, never below, and with all tokens the Kullback-Leibler divergence."""
    p, q = torch.randn(7, 20), torch.randn(7, 20)
    assert float(found(p, TopPredictions.of(p, 5))) == pytest.approx(0, abs=1e-6)
    assert float(found(q, TopPredictions.of(p, 5))) > 0
    whole = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert float(found(q, TopPredictions.of(p, 1000))) == pytest.approx(float(whole), rel=1e-5)


def test_the_divergence_counts_all_other_tokens_as_one():
    """A student that differs from the teacher in how much it gives to them alone; by distributions written out, and with a gradient."""
    p = torch.randn(7, 20)
    teacher = TopPredictions.of(p, 5)
    q = p.clone().scatter_add_(1, teacher.ids.long(), torch.ones(7, 5)).requires_grad_()
    top = p.softmax(-1).gather(1, teacher.ids.long()).sum(-1), q.softmax(-1).gather(1, teacher.ids.long()).sum(-1)
    expected = (top[0] * (top[0] / top[1]).log() + (1 - top[0]) * ((1 - top[0]) / (1 - top[1])).log()).mean()
    assert float(top_divergence(q.detach(), teacher)) == pytest.approx(0, abs=1e-6)
    assert (
        float(divergence(q, teacher).detach()) == pytest.approx(float(expected.detach()), rel=1e-5) and expected > 0.01
    )
    (wanted,), (got,) = torch.autograd.grad(expected, q), torch.autograd.grad(divergence(q, teacher), q)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_the_float_model(build):
    built = build("llama", "quantize-weights", gptq_on_quantized_activations=True)
    exact = build("llama", "quantize-activations", gptq_on_quantized_activations=True)
    found = teach(built.gm, built.topology, built.ctx.windows[:2], 3, lambda done, total: None)
    top = logits_of(exact.gm, exact.ctx.windows[:2]).topk(3)
    assert all(torch.equal(f.ids.long(), ids) for f, ids in zip(found, top.indices, strict=True))


def online(built):
    return sum(n.target in TARGETS for n in built.gm.graph.nodes)


@pytest.mark.parametrize(
    "recipe, base, name",
    [("spinquant", "quarot", "learn-rotations"), ("ostquant", "quarot", "learn-rotations"), ("resq-trained", "resq", "learn-rotations"),
     ("resq++", "resq+", "learn-scales"), ("resq-cpu", "resq+", "learn-scales"), ("omniquant", "rtn", "learn-blocks")],
)  # fmt: skip
def test_learning_lowers_its_loss_on_other_windows_and_costs_nothing(recipe, base, name, build):
    """Where nothing better is found, the start stays: the loss is never above it. No operator more than without learning."""
    built = build("llama", recipe=recipe, learning_steps=4, weight_method="rtn")
    lines = [s for stage in built.pipeline.stages if stage.name == name for s in stage.lines]
    found = [re.search(r"trained on (\S+) at the start, (\S+) at step", line) for line in lines]
    numbers = [(float(match[1]), float(match[2])) for match in found if match]
    assert numbers and all(best <= start for start, best in numbers), lines
    assert online(built) == online(build("llama", recipe=base, weight_method="rtn"))
    assert all(CodedLinear.of(n) is not None for n in built.gm.graph.nodes if meta.get(n, meta.LinearPart) is not None)


def with_text(built, exact, windows=16):
    """More to learn from, with the float model's predictions for it."""
    ctx = dataclasses.replace(built.ctx, calibration=tiny_tokens(windows, 64, seed=1))
    quiet = lambda done, total: None  # noqa: E731
    ctx.facts.put(Teacher(teach(exact.gm, exact.topology, ctx.windows, 1000, quiet)))
    return ctx


def test_rotations_are_found(build):
    """Principal directions that nothing has turned yet leave much to find: the loss on windows that were not trained on falls."""
    options = {
        "recipe": "resq++",
        "allocation": "equal",
        "activation_clip": 1.0,
        "rotation": "none",
        "learn_rotations": "divergence",
    }
    built, exact = build("llama", "learn-rotations", **options), build("llama", "quantize-activations", **options)
    ctx = with_text(built, exact)
    assert LearnRotations(steps=30, rate=0.02, batch=2).run(built.gm, ctx) == 3, (
        ctx.lines
    )  # the stream, and values of two blocks
    start, best = re.search(r"trained on (\S+) at the start, (\S+) at step", ctx.lines[-1]).groups()
    assert float(best) < 0.99 * float(start)


def test_ranges_of_groups_of_columns_are_learned_and_those_of_heads_are_not(build):
    """Groups of 32 columns; output projections have a group for each of four heads."""
    built = build("llama", "quantize-kv-cache", weight_method="rtn", activation_group_size=32, high_fraction=0.0)
    found = {
        (Quantize.require(n).groups, may_learn_clip(n) is not None) for n in built.gm.graph.nodes if Quantize.of(n)
    }
    assert found == {(2, True), (5, True), (4, False)}


def test_learned_scales_leave_the_codes_alone(build):
    options = {
        "recipe": "resq++",
        "weight_method": "rtn",
        "learn_rotations": "none",
        "allocation": "equal",
        "activation_clip": 0.9,
        "activation_group_size": None,
    }
    built, exact = build("llama", "learn-scales", **options), build("llama", "quantize-activations", **options)
    ctx = with_text(built, exact)
    before = {str(n.target): graph_tools.get_tensor(built.gm, n) for n in built.gm.graph.find_nodes(op="get_attr")}
    clips = {n.name: q.clip for n in built.gm.graph.nodes if (q := Quantize.of(n)) is not None}
    assert LearnScales(steps=20, rate=0.005, batch=2).run(built.gm, ctx) > 0, ctx.lines
    after = {str(n.target): graph_tools.get_tensor(built.gm, n) for n in built.gm.graph.find_nodes(op="get_attr")}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".scale") for name in changed)
    made = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert made == {"learned_weight"}  # gains of norms, which fold-norms took away
    moved = [n for n in built.gm.graph.nodes if (q := Quantize.of(n)) is not None and q.clip != clips[n.name]]
    assert moved and all(0.3 <= Quantize.require(n).clip <= 1 for n in moved)
    caches = [c for n in built.gm.graph.nodes if (c := QuantizeDequantize.of(n)) is not None]
    assert [c.clip for c in caches[::2]] == [c.clip for c in caches[1::2]] and caches[
        0
    ].clip != 1  # kernels have one for both


def test_learned_codes_move_inside_their_range(build):
    """Codes and scales, and no float weight; what a run computes with while learning is what is written."""
    options = {"recipe": "resq+", "weight_method": "rtn", "allocation": "equal", "gptq_on_quantized_activations": True}
    built, exact = build("llama", **options), build("llama", "quantize-activations", **options)
    ctx = with_text(built, exact, 64)
    codes = {c.name: c.codes(built.gm) for n in built.gm.graph.nodes if (c := CodedLinear.of(n)) is not None}
    assert LearnScales(codes=True, steps=60, code_rate=0.004, gains=False, clips=False).run(built.gm, ctx) > 0, (
        ctx.lines
    )
    moved = 0
    for node in built.gm.graph.nodes:
        if (coded := CodedLinear.of(node)) is not None:
            found, bits = coded.codes(built.gm), meta.require(node, meta.LinearPart).weight_bits
            assert (
                found.dtype == torch.int8
                and -(2 ** (bits - 1)) <= int(found.min())
                and int(found.max()) < 2 ** (bits - 1)
            )
            moved += int((found != codes[coded.name]).sum())
    assert moved > 0
    start, best = re.search(r"trained on (\S+) at the start, (\S+) at step", ctx.lines[-1]).groups()
    windows = ctx.windows[-held_back(len(ctx.windows), "test") :]
    teacher = ctx.facts.get(Teacher).windows[-len(windows) :]
    logits = logits_of(built.gm, windows, Run(built.gm))
    written = sum(float(divergence(*pair)) for pair in zip(logits, teacher, strict=True)) / len(windows)
    assert float(best) < float(start) and written == pytest.approx(float(best), rel=1e-3)


def test_promised_weights_are_made_once_before_learning(build, tmp_path):
    """In memory, or in files of a work directory; there they stay promises, and so do what learning makes of them."""
    for work in (None, WorkDirectory(tmp_path / "work", {})):
        built = build("llama", "quantize-activations", recipe="resq", gptq_on_quantized_activations=True)
        expected = {}
        for name, value in list(built.gm.named_buffers()):
            expected[name] = value
            changed = Changed(in_memory(value / 2), lambda half: half * 2)
            graph_tools.set_tensor(built.gm, name, Promised(changed))
        hold(built.gm, work)
        before = ledger.made
        for name, value in built.gm.named_buffers():
            assert isinstance(value, Promised) == (work is not None)
            assert torch.equal(graph_tools.made(built.gm, name), expected[name])
            assert not isinstance(getattr(getattr(value, "promise", None), "of", None), Stored)
        assert work is None or ledger.made == before + len(expected)


def test_a_stream_that_cannot_be_rotated_is_told(build):
    built = build("gemma2", "learn-rotations", recipe="resq-trained")
    LearnRotations("cross-entropy", steps=2, optimizer="sgd").run(built.gm, built.ctx)
    assert [n for n in built.ctx.notes if "the rotation of the stream is not learned: U_A stays online" in n]


def test_a_stream_that_some_norms_leave_is_not_rotated(build):
    """The matrix of a norm that keeps its gain leads out of the stream's basis, which must stay what it is."""
    built = build("llama", "learn-rotations", recipe="resq-trained")
    built.topology.readers[0].online = True
    reason = Places(built.gm, built.topology, built.plan).add_stream(Learned())
    assert reason is not None and reason.startswith("U_A stays online before 1 inputs")


def test_the_divergence_needs_a_teacher(build):
    built = build("llama", "learn-rotations", recipe="resq-trained")
    assert built.ctx.facts.find(Teacher) is None
    with pytest.raises(PassError, match="Teacher is not known yet"):
        LearnRotations("divergence", steps=2).run(built.gm, built.ctx)


def test_too_few_windows_are_told(build):
    built = build("llama", "learn-rotations", recipe="resq-trained")
    ctx = dataclasses.replace(built.ctx, calibration=built.ctx.windows[:1])
    with pytest.raises(Exception, match="learn-rotations: 1 calibration windows are too few"):
        LearnRotations("cross-entropy", steps=2).run(built.gm, ctx)


def test_a_linear_that_stays_float_is_told(build):
    built = build("llama", "learn-rotations", recipe="resq-trained")
    topology = dataclasses.replace(built.topology, floats=[built.topology.head])
    with pytest.raises(
        PassError, match="stays in float by the topology's overrides, and transforms are not learned around it"
    ):
        Places(built.gm, topology, built.plan).check("learn-rotations", pairs=True)
    Places(built.gm, topology, built.plan).check("learn-scales", pairs=False)
    topology = dataclasses.replace(built.topology, routers=[built.topology.head])
    with pytest.raises(
        PassError, match="learn-scales: the model has experts, whose quantized operators have no gradients here"
    ):
        Places(built.gm, topology, built.plan).check("learn-scales", pairs=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "resq", "learn_scales": True}, "learn_scales: expected gptq_on_quantized_activations=True beside it"),
        ({"recipe": "spinquant", "basis": "none"}, "learn_rotations: expected basis=pca or weights or hadamard beside it; got basis=none"),
        ({"recipe": "resq", "learn_pairs": True}, "learn_pairs: expected learn_rotations=divergence or cross-entropy beside it"),
        ({"recipe": "omniquant", "weight_method": "gptq"}, "learn_blocks: expected weight_method=rtn beside it"),
        ({"recipe": "resq", "learn_codes": True}, "learn_codes: expected learn_scales=True beside it"),
        ({"recipe": "resq++", "learning_steps": 0}, "learning_steps: expected a whole number of at least 1"),
        ({"recipe": "resq++", "activation_scales": "static"}, "expected activation_scales=dynamic beside it"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        named.resolve(**options)


def test_weights_that_are_learned_block_by_block_have_codes(build):
    built = build("llama", recipe="omniquant", learning_steps=4, weight_group_size=32)
    coded = [c for n in built.gm.graph.nodes if (c := CodedLinear.of(n)) is not None]
    assert len(coded) == 14 and all(c.group_size == 32 and c.on_codes for c in coded)
    assert not built.gm.graph.find_nodes(op="call_function", target=ops.weight_only_linear)
