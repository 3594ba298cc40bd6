"""Embeddings out of lm_head's codes: the map by least squares, what an export computes with it, and who is refused."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import build_model, export_onnx
from resq_compiler.backends.onnx.kept_logits import ELEMENTWISE
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.tied_embedding import FURTHEST, image

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.views import CodedLinear, Embedding
from resq_compiler.tiny import tiny_tokens
from tests.backends.coded import coded
from tests.backends.onnx.conftest import relative


@pytest.fixture(autouse=True)
def built_library(library, monkeypatch):
    """The kernels are those of the tree, installed or not."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(libraries, "unavailable", lambda: None)


def test_an_image_is_found_exactly_whatever_the_pieces():
    draw = torch.Generator().manual_seed(0)
    rows, wanted = torch.randn(200, 24, generator=draw), torch.randn(24, 16, generator=draw)
    for size in (200, 33):
        found, error = image(lambda i, j: rows[i:j], (rows @ wanted).split(size))
        torch.testing.assert_close(torch.from_numpy(found), wanted)
        assert error < 3e-5  # the square root of ROUNDING


def test_the_error_is_what_least_squares_leaves():
    draw = torch.Generator().manual_seed(1)
    rows, table = torch.randn(200, 24, generator=draw), torch.randn(200, 16, generator=draw)
    found, error = image(lambda i, j: rows[i:j], [table])
    best = torch.linalg.lstsq(rows.double(), table.double()).solution
    left = (rows.double() @ best - table.double()).norm() / table.double().norm()
    assert error == pytest.approx(float(left), rel=1e-6) and error > FURTHEST
    torch.testing.assert_close(torch.from_numpy(found), best.float(), rtol=1e-4, atol=1e-5)


def head_rows(compiled):
    """What lm_head's codes stand for, [V, K]."""
    node = graph_tools.output_args(compiled.graph_module.graph)[0]
    while node.target in ELEMENTWISE:
        (node,) = node.all_input_nodes
    head = CodedLinear.require(node)
    gm = compiled.graph_module
    return head.codes(gm).float() * graph_tools.get_tensor(gm, head.scale)[:, None]


def test_an_export_computes_with_the_map_and_stores_no_table(compile_tiny, tmp_path):
    """The quantized graph with its table replaced by the image of lm_head's rows, in every logit."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    path = export_onnx(compiled, tmp_path / "model", "native", embedding="lm_head")
    gm = graph_tools.snapshot(compiled.graph_module)
    (view,) = (v for v in map(Embedding.of, gm.graph.nodes) if v is not None)
    rows, table = head_rows(compiled), view.table_tensor(gm)
    found, error = image(lambda i, j: rows[i:j], [table])
    assert error < FURTHEST
    ids, kept = tiny_tokens(2, 9, seed=12), view.table_tensor(compiled.graph_module).clone()
    graph_tools.set_tensor(compiled.graph_module, str(view.table.target), rows @ torch.from_numpy(found))
    try:
        with torch.no_grad():
            expected = coded(compiled, lambda model: model(ids).logits)
    finally:
        graph_tools.set_tensor(compiled.graph_module, str(view.table.target), kept)
    decoder = OnnxDecoder(path, threads=1)
    mask = torch.ones_like(ids)
    logits, _ = decoder.forward(ids.numpy(), mask.numpy(), (mask.cumsum(-1) - 1).numpy(), decoder.empty_past(2))
    assert relative(logits.numpy(), expected.numpy()) < 2e-2  # a code may move by a step
    names = {tensor.name for tensor in build_model(compiled, "native", embedding="lm_head").graph.initializer}
    assert not any("embed_tokens" in name or "embedding.table" in name or name.endswith(".codes") for name in names)


@pytest.mark.parametrize(
    ("family", "options", "profile", "reason"),
    [
        ("llama", {}, "native", "lm_head has no codes to read rows of; compile with lm_head_bits=8"),
        ("llama-untied", {"lm_head_bits": 8}, "native", "expected at most 0.05: the two are not tied; say embedding='int8'"),
        ("llama", {"lm_head_bits": 8}, "ort", "for profile native alone.*got profile ort"),
    ],
)  # fmt: skip
def test_who_is_refused(compile_tiny, tmp_path, family, options, profile, reason):
    compiled, _ = compile_tiny(family, weight_method="rtn", **options)
    with pytest.raises(BackendError, match=reason):
        export_onnx(compiled, tmp_path / "model", profile, embedding="lm_head")
    assert not (tmp_path / "model").exists()
