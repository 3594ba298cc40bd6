"""Bits of single experts, from the routing that was planted to codes, files and ONNX."""

from __future__ import annotations

import math

import pytest
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx import build_model

import resq_compiler
from resq_compiler.analysis.expert_bits import ExpertBits
from resq_compiler.analysis.sensitivity import expert_shares
from resq_compiler.errors import ConfigError
from resq_compiler.evaluation.sizes import active_part, average_bits, memory_bytes
from resq_compiler.ir import meta
from resq_compiler.ir.linears import PARTS
from resq_compiler.ir.views import CodedLinear
from resq_compiler.numerics.packing import packed_length
from resq_compiler.recipes.named import resolve
from resq_compiler.tiny import tiny_tokens
from tests.families import ONE_CODE, ROUNDING, onnx_errors, small

IDS = tiny_tokens(2, 20, seed=5)
PLUS = {
    "recipe": "resq+",
    "weight_method": "rtn",
    "unreached_experts": "layer",
    "calibration_samples": 8,
    "calibration_length": 32,
}
PLAIN = {"recipe": "rtn", "calibration_samples": 8, "calibration_length": 32}


def planted():
    """Block 1 has experts: the first one gets every token, the second most of them, the last one none."""
    model = small("dots1")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([2.0, 0.2, 0.0, -2.0]))
    return model


def compiled(**options):
    return resq_compiler.compile(planted(), tiny_tokens(8, 32), **options)


@pytest.fixture(scope="module")
def shared_out():
    return compiled(**PLUS, allocation="widths")


def parts_of_experts(model) -> list[tuple[CodedLinear, meta.LinearPart]]:
    nodes = model.graph_module.graph.nodes
    views = [
        (CodedLinear.of(n), meta.require(n, meta.LinearPart))
        for n in nodes
        if meta.get(n, meta.LinearPart) and n.target in PARTS
    ]
    return [(view, part) for view, part in views if view is not None and view.of_experts]


def test_bits_go_where_predictions_feel_them(shared_out):
    (said,) = ExpertBits.parse(shared_out.options.expert_bits).items
    assert said.block == 1
    assert said.main[0] >= said.main[1] >= said.main[2] >= said.main[3]
    assert said.main[0] > 4 > said.main[3]
    stage = next(s for s in shared_out.stages if s.name == "allocate-bits")
    assert any(line.startswith("forecast of the error of experts' weights: ") for line in stage.lines)
    assert f"bits of the experts of block {said}" in stage.lines


def test_codes_have_these_bits_and_no_more_of_them_together(shared_out):
    (said,), parts = ExpertBits.parse(shared_out.options.expert_bits).items, parts_of_experts(shared_out)
    assert len(parts) == 6  # gate, up and down, each of two parts
    spent = equal = 0
    for view, part in parts:
        codes = view.codes(shared_out.graph_module)
        assert part.expert_bits == (said.high if part.index else said.main)
        for mine, bits in zip(codes, part.expert_bits, strict=True):
            assert -(2 ** (bits - 1)) <= int(mine.min()) and int(mine.max()) < 2 ** (bits - 1)
            assert int(mine.abs().max()) > 2 ** (bits - 2)
        spent += codes[0].numel() * sum(part.expert_bits)
        equal += codes.numel() * (8 if part.index else 4)
    assert 0.95 * equal < spent <= equal


def test_sizes_by_hand(shared_out):
    """Rows of every expert are packed at its width."""
    total = bits = count = 0
    for node in shared_out.graph_module.graph.nodes:
        view, part = CodedLinear.of(node), meta.get(node, meta.LinearPart)
        if view is None or part is None or part.site.role == "head":
            continue
        *rows, width = view.codes(shared_out.graph_module).shape
        each = part.expert_bits or (part.weight_bits,)
        total += sum(math.prod(rows) // len(each) * packed_length(width, b) for b in each)
        bits += sum(math.prod(rows) // len(each) * width * b for b in each)
        count += math.prod(rows) * width
    assert memory_bytes(shared_out)["weight_codes"] == total
    assert average_bits(shared_out).weights == pytest.approx(bits / count, rel=1e-12)
    assert active_part(shared_out)["active"]["bytes"] == total + memory_bytes(shared_out)["weight_scales"]


def test_written_by_hand_it_is_the_same_model(shared_out):
    said = {name: getattr(shared_out.options, name) for name in ("site_fractions", "expert_bits")}
    again = compiled(**PLUS, allocation="equal", **said)
    assert torch.equal(again(IDS).logits, shared_out(IDS).logits)
    plain = compiled(**PLUS, allocation="equal", site_fractions=said["site_fractions"])
    assert not torch.equal(plain(IDS).logits, shared_out(IDS).logits)


def test_saved_and_loaded_it_computes_the_same(shared_out, tmp_path):
    shared_out.save_pretrained(tmp_path)
    loaded = resq_compiler.load(tmp_path)
    assert torch.equal(loaded(IDS).logits, shared_out(IDS).logits)
    assert [part for _, part in parts_of_experts(loaded)] == [part for _, part in parts_of_experts(shared_out)]
    lying = (tmp_path / "model.safetensors").stat().st_size
    assert 0 <= lying - memory_bytes(shared_out)["total"] < 40_000  # the header


@pytest.mark.parametrize("profile", ["ort", "qdq"])
def test_onnx_keeps_wide_and_narrow_experts_apart(shared_out, profile):
    errors = onnx_errors(shared_out, profile)
    assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE
    (said,) = ExpertBits.parse(shared_out.options.expert_bits).items
    wide = sum(bits > 4 for bits in said.main)
    kept = {
        t.name: (t.data_type, t.dims[0])
        for t in build_model(shared_out, profile, embedding="float32").graph.initializer
        if ".part0" in t.name and ("narrow" in t.name or "wide" in t.name)
    }
    assert len(kept) == 4  # gate and up together, and down
    for name, found in kept.items():
        assert found == ((TensorProto.INT4, 4 - wide) if "narrow" in name else (TensorProto.INT8, wide))


def test_the_bits_of_the_columns_said_for_every_expert_change_nothing():
    told = compiled(**PLAIN, expert_bits="1=4444")
    assert torch.equal(told(IDS).logits, compiled(**PLAIN)(IDS).logits)


def test_an_expert_of_two_bits_is_that_of_a_model_of_two_bits():
    told, two, four = (compiled(**PLAIN, **options) for options in ({"expert_bits": "1=4244"}, {"weight_bits": 2}, {}))
    for (view, _), (low, _), (high, _) in zip(*(parts_of_experts(m) for m in (told, two, four)), strict=True):
        codes, narrow, wide = (v.codes(m.graph_module) for v, m in ((view, told), (low, two), (high, four)))
        assert torch.equal(codes[1], narrow[1]) and torch.equal(codes[[0, 2, 3]], wide[[0, 2, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0=4444", "expected a block with experts; got block 0, which has none"),
        ("1=444", "block 1 has 4 experts .*expected a digit for each, of main columns too; got 1=444"),
        ("1=4444/8888", "expected no bits of high columns, block 1 has none of them; got 1=4444/8888"),
    ],
)
def test_bits_of_experts_that_are_not_there(text, message):
    with pytest.raises(ConfigError, match=f"option expert_bits: {message}"):
        compiled(**PLAIN, expert_bits=text)


def test_stated_bits_are_not_shared_out():
    assert resolve("resq+", expert_bits="0=44").allocation == "equal"
    with pytest.raises(ConfigError, match=r"option allocation: .*no expert_bits.*expert_bits='0=44'"):
        resolve("resq+", expert_bits="0=44", allocation="sensitivity")


def test_shares_of_experts_by_hand():
    """Two tokens, two choices of three experts."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [2.0, 2.0]]]], requires_grad=True)
    (x * torch.tensor([1.0, 3.0])).sum().backward()  # |g|² / (2 width) is 10 / 4
    found = expert_shares(x, torch.tensor([[0, 2], [2, 0]]), 3)
    assert found.tolist() == [2.5 * (5 + 8), 0.0, 2.5 * (9 + 1)]
