"""Chains: operators one behind the other as one node, which computes what they compute apart; damaged ones are refused by name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import export_onnx
from resq_compiler.backends.onnx.chain import CHAIN, DOMAIN, chained, unchained
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.speed import time_by_operator

from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokens


@pytest.fixture(scope="module")
def exported(library, compile_tiny, tmp_path_factory):
    """family -> its export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "library", lambda: library)

        def export(family, **options):
            compiled, _ = compile_tiny(family, recipe="resq", weight_method="rtn", **options)
            return export_onnx(compiled, tmp_path_factory.mktemp(family) / "model", "native", embedding="int8")

        yield export


def step(kind, inputs, outputs, **attributes):
    return helper.make_node(
        kind, inputs.split(), outputs.split(), name=f"n_{outputs.split()[0]}", domain=DOMAIN, **attributes
    )


def plain(kind, inputs, output):
    return helper.make_node(kind, inputs.split(), [output], name=f"n_{output}")


def as_text(nodes):
    return [(n.op_type, list(n.input), list(n.output), sorted(a.name for a in n.attribute)) for n in nodes]


def test_what_stands_between_steps():
    """What reads nothing of theirs goes before them, the rest behind; a step that reads that begins another chain."""
    nodes = [
        step("NormLinear", "x w", "a", low_width=3),
        plain("Cos", "x", "before"),
        step("MixedLinear", "a before", "b"),
        plain("Sin", "b", "behind"),
        step("NormLinear", "b", "c"),
        step("NormLinear", "behind", "d"),
        step("NormLinear", "d", "e"),
    ]
    got, types = chained(nodes, ["c", "e"])
    assert [n.op_type for n in got] == ["Cos", CHAIN, "Sin", CHAIN]
    assert [list(n.output) for n in got] == [["before"], ["b", "c"], ["behind"], ["e"]]
    assert list(got[1].input) == ["x", "w", "before"]
    assert [(t.name, t.type.tensor_type.elem_type) for t in types] == [("b", TensorProto.FLOAT)]


def test_steps_alone_stay_nodes():
    nodes = [step("NormLinear", "x", "a"), plain("Cos", "a", "b"), step("NormLinear", "b", "c")]
    got, types = chained(nodes, ["c"])
    assert as_text(got) == as_text(nodes) and not types
    assert chained([plain("Cos", "x", "y")], ["y"]) == ([plain("Cos", "x", "y")], [])


def test_slots_are_used_again():
    """A value's slot is free behind the last step that reads it, not for the outputs of that step."""
    nodes = [step("NormLinear", f"v{i} v{max(i - 1, 0)}", f"v{i + 1}") for i in range(9)]
    (chain,), _ = chained(nodes, ["v9"])
    assert next(a.i for a in chain.attribute if a.name == "slots") == 3


def test_steps_of_a_chain_are_nodes_again():
    nodes = [
        step("NormLinear", "x", "a", low_width=3, epsilon=0.5),
        step("RopeCache", "a c s k v m", "q pk pv", heads=2),
        step("NormQuantize", "q", "l h s1 z"),
        helper.make_node("MixedLinear", ["l", "h", "s1", "z", "", "w"], ["y"], name="last", domain=DOMAIN),
    ]
    (chain,), _ = chained(nodes, ["y", "pk", "pv"])
    back = list(unchained([chain]))
    assert [n.name for n in back] == ["n_a", "n_q", "n_l", "last"]
    assert [list(n.attribute) for n in back] == [list(n.attribute) for n in nodes]
    assert list(back[1].output[1:]) == ["pk", "pv"] and back[3].input[4:] == ["", "w"] and back[3].output[0] == "y"
    assert back[3].input[:4] == back[2].output and back[1].input[0] == back[0].output[0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "qwen3"])
def test_chains_compute_what_their_steps_compute(family, exported, tmp_path):
    """To the bit, padded prompts and tokens behind them."""
    path = exported(family, lm_head_bits=8)
    one, apart = OnnxDecoder(path, threads=1), OnnxDecoder(path, threads=1, profile=tmp_path / "profile")
    assert sum(n.op_type == CHAIN for n in onnx.load(path / "model.onnx").graph.node) > 0
    ids = tiny_tokens(2, 9, seed=12).numpy()
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    logits = [d.forward(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), d.empty_past(2))[0].numpy() for d in (one, apart)]
    assert np.array_equal(*logits)
    got, expected = (d.generate(ids, mask, max_new_tokens=8, eos_token_id=[]) for d in (one, apart))
    assert np.array_equal(got, expected)


def test_runs_at_the_same_time(exported):
    """Every call has memory of its own."""
    decoder = OnnxDecoder(exported("llama"), threads=1)
    prompts = [tiny_tokens(1 + i % 3, 5 + 4 * i, seed=i).numpy() for i in range(6)]

    def logits(ids):
        positions = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        return decoder.forward(ids, np.ones_like(ids), positions, decoder.empty_past(len(ids)))[0].numpy()

    expected = [logits(ids) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(logits, prompts * 4))
    assert all(np.array_equal(a, b) for a, b in zip(got, expected * 4, strict=True))


def change_step(chain, number, change):
    found = next(a for a in chain.attribute if a.name == f"{number}_step")
    found.s = change(found.s.decode()).encode()


def number_of(chain, kind):
    return next(a.name.partition("_")[0] for a in chain.attribute if a.s.startswith(f"{kind} ".encode()))


def remove(chain, name):
    (index,) = (i for i, a in enumerate(chain.attribute) if a.name == name)
    del chain.attribute[index]


DAMAGED = {
    "an unknown operator": lambda c: change_step(c, 0, lambda text: "New" + text),
    "a register too many": lambda c: change_step(c, 0, lambda text: text + " 1"),
    "a register that is none": lambda c: change_step(c, 0, lambda text: text + "999999"),
    "no outputs": lambda c: change_step(c, 0, lambda text: text.partition(" >")[0]),
    "no inputs": lambda c: change_step(c, 0, lambda text: text.split()[0]),
    "an input written to": lambda c: change_step(c, 0, lambda text: text.partition("> ")[0] + "> 0"),
    "a required input absent": lambda c: change_step(c, number_of(c, "AttentionLinear"), lambda text: text.replace(" ", " -1 ", 1)),
    "no steps": lambda c: remove(c, "steps"),
    "a step missing": lambda c: remove(c, "1_step"),
    "a name missing": lambda c: remove(c, "1_name"),
    "many slots": lambda c: next(a for a in c.attribute if a.name == "slots").__setattr__("i", 2**40),
    "fewer inputs": lambda c: next(a for a in c.attribute if a.name == "reads").__setattr__("i", 1),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_chain(damage, exported):
    path = exported("llama") / "model.onnx"
    model = onnx.load(path)
    DAMAGED[damage](max((n for n in model.graph.node if n.op_type == CHAIN), key=lambda n: len(n.attribute)))
    onnx.save(model, path)
    with pytest.raises(BackendError, match="cannot load the model"):
        OnnxDecoder(path.parent, threads=1)


def test_an_operand_of_another_type_or_of_a_later_step(exported):
    """Found when the chain runs: the step is named."""
    path = exported("llama") / "model.onnx"
    original = onnx.load(path)
    for register in ("mask", "later"):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        chain = max((n for n in model.graph.node if n.op_type == CHAIN), key=lambda n: len(n.attribute))
        number = number_of(chain, "AttentionLinear")
        text = next(a for a in chain.attribute if a.name == f"{number}_step").s.decode().split()
        text[1] = text[6] if register == "mask" else str(len(chain.input) + len(chain.output))
        change_step(chain, number, lambda _: " ".join(text))  # noqa: B023
        onnx.save(model, path)
        decoder = OnnxDecoder(path.parent, threads=1)
        with pytest.raises(
            Exception, match="AttentionLinear: an input does not fit: expected the type that its operator"
        ):
            decoder.generate(tiny_tokens(1, 4, seed=1).numpy(), max_new_tokens=2, eos_token_id=[])


def test_times_by_operator_tell_steps_apart(exported):
    rows = {name: calls for name, calls, _ in time_by_operator(exported("llama"), 1, prompt=4, new=2)}
    assert CHAIN not in rows and rows["AttentionLinear"] == 3 * 2 and rows["Embed"] == 3
