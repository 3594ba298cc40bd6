"""Models whose large tensors are made when they are written: the bytes of onnx's own writer, and never two tensors at once."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.cpu.target import CPU
from resq_compiler.backends.fused.formats import InputPart
from resq_compiler.backends.fused.packing import below, pack_weight
from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes, export  # noqa: F401  (each registers its emitters)
from resq_compiler.backends.onnx.builder import SMALL_CONSTANT, GraphBuilder
from resq_compiler.backends.onnx.draft import Draft
from resq_compiler.backends.onnx.export import draft_model
from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.lowering import Lowering, LoweringOptions

from resq_compiler import api, load
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.frontend.models import open_model
from resq_compiler.ir import promises
from resq_compiler.ir.promises import Promised, promise_of
from resq_compiler.tiny import tiny_model

ROWS = 2 * SMALL_CONSTANT


def graph(pieces) -> GraphBuilder:
    """x times a large constant, plus a small one, and a table in INT4."""
    b = GraphBuilder(21)
    x = b.input("x", TensorProto.FLOAT, ("batch", 4))
    y = b.op("MatMul", x, b.later("weight", (4, ROWS), np.float32, pieces))
    y = b.op("Add", y, b.constant(np.arange(300, dtype=np.float32)[:1]))
    codes = b.int4("codes", (3, ROWS), lambda: (np.full((1, ROWS), i, np.int8) for i in range(3)))
    b.op("Mul", b.op("Cast", codes, to=TensorProto.FLOAT), y, output="z")
    b.output("z", TensorProto.FLOAT, (3, ROWS))
    return b


def rows():
    return (np.full((1, ROWS), i, np.float32) for i in range(4))


def test_files_are_those_of_onnx(tmp_path):
    draft = graph(rows).draft("g", {"key": "value"}, "1")
    draft.save_apart(tmp_path / "ours.onnx", "data")
    data = (tmp_path / "data").read_bytes()
    (tmp_path / "data").unlink()
    onnx.save(draft.whole(), tmp_path / "theirs.onnx", save_as_external_data=True, location="data", size_threshold=1024)
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert data == (tmp_path / "data").read_bytes()
    assert len(data) == 4 * 4 * ROWS + 3 * ROWS // 2
    read = onnx.load(tmp_path / "ours.onnx")
    onnx.checker.check_model(read, full_check=True)
    assert draft.nbytes == draft.proto.ByteSize() + len(data)


def test_a_piece_is_let_go_before_the_next_is_made(tmp_path):
    made: list[weakref.ref] = []

    def pieces():
        for array in rows():
            assert all(reference() is None for reference in made)
            made.append(weakref.ref(array))
            yield array
            del array

    graph(pieces).draft("g", {}, "1").save_apart(tmp_path / "model.onnx", "data")
    assert len(made) == 4 and all(reference() is None for reference in made)


def test_small_ones_are_constants_and_a_name_means_one_tensor():
    b = GraphBuilder(21)
    once = b.later("table", (2, 3), np.float32, lambda: (np.ones((2, 3), np.float32),))
    assert b.later("other", (2, 3), np.float32, lambda: (np.ones((2, 3), np.float32),)) == once
    large = [b.later("large", (ROWS,), np.float32, rows) for _ in range(2)]
    assert large == ["large", "large"] and len(b.initializers) == 2


@pytest.mark.parametrize("profile", ["native", "ort", "qdq"])
def test_an_export_holds_one_tensor_at_a_time(profile, compiled, library, monkeypatch, tmp_path):
    """Counted in what is made of promises: as a saved model has them, whose codes are unpacked when somebody looks."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(export, "EXTERNAL_DATA_ABOVE", 0)
    compiled("llama", recipe="resq", weight_method="rtn").save_pretrained(tmp_path / "saved")
    result = load(tmp_path / "saved").result
    sizes = [tensor.nbytes for tensor in result.graph_module.buffers() if isinstance(tensor, Promised)]
    promises.ledger.reset()
    before = promises.ledger.held
    export.save_model(draft_model(result, profile, embedding="int8"), tmp_path)
    assert promises.ledger.made >= len(sizes)
    most = 4 * max(sizes)  # codes of two linears below each other, once as they are and once packed
    assert promises.ledger.most - before <= most < sum(sizes)


def float_draft(model) -> Draft:
    """The float graph of a model in standard operators."""
    gm, ctx = api.trace(model)
    entries = ctx.example_inputs[3:]
    cache = tuple(
        CacheSpec(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(entries[::2], entries[1::2], strict=True)
    )
    return Lowering(gm, cache, IntegerForm(), LoweringOptions("float32")).run().draft("float32", {}, "1")


def test_float_weights_are_read_when_they_are_written(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "float")
    opened = open_model(tmp_path / "float")
    draft = float_draft(opened)
    promises.ledger.reset()
    before = promises.ledger.held
    draft.save_apart(tmp_path / "opened.onnx", "opened.data")
    weights = [promise.nbytes for promise in opened.weights.values() if len(promise.shape) > 1]
    assert promises.ledger.most - before <= max(weights) < sum(weights) / 4
    float_draft(model).save_apart(tmp_path / "model.onnx", "model.data")
    assert (tmp_path / "opened.data").read_bytes() == (tmp_path / "model.data").read_bytes()


def test_codes_are_packed_the_same_later():
    """Of two linears below each other, with an edge inside of a tile, in pieces of any size."""
    generator = torch.Generator().manual_seed(3)
    part = InputPart(4, 24, 1)
    codes = [torch.randint(-8, 8, (n, 24), generator=generator, dtype=torch.int8) for n in (70, 131)]
    scale = torch.rand(201, generator=generator)
    now = pack_weight(CPU.codes, [(below(codes, later=False), scale, part)])
    promised = below([Promised(promise_of(codes[0])), codes[1]], later=True)
    for at_a_time in (1, 24 * 64, 24 * 129, 2**22):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("resq_compiler.backends.fused.packing.AT_A_TIME", at_a_time)
            later = pack_weight(CPU.codes, [(promised, scale, part)])
            for name in ("low", "high", "scale", "row_sum"):
                value, expected = getattr(later, name), getattr(now, name)
                assert value.shape == expected.shape
                assert torch.equal(value.make() if isinstance(value, Promised) else value, expected)
