"""Models whose finished blocks wait in files: the same bits, the same saved model, and nothing that stays behind."""

from __future__ import annotations

import gc
import tempfile
from unittest import mock

import pytest
import torch

import resq_compiler
from resq_compiler.frontend.capture import capture_promised
from resq_compiler.frontend.opened import of_instance
from resq_compiler.frontend.source import ModelSource
from resq_compiler.ir import graph_tools, promises
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import Pipeline, prefill_and_decode
from resq_compiler.recipes.named import passes_for, resolve
from resq_compiler.tiny import tiny_model, tiny_tokens
from resq_compiler.util import memory

SMALL = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}


@pytest.mark.parametrize("recipe", ["resq", "rtn"])
def test_blocks_in_files_change_nothing(recipe, compiled, tmp_path, monkeypatch):
    plain = compiled("llama", recipe=recipe)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(memory, "LARGE_MODEL", 1)
    large = resq_compiler.compile(tiny_model("llama"), tiny_tokens(4, 32), recipe=recipe, **SMALL)
    (work,) = (tmp_path / "temporary").iterdir()
    assert {file.name for file in work.iterdir()} >= {"block-0000.safetensors", "block-0001.safetensors"}
    ours, theirs = large.graph_module.state_dict(), plain.graph_module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(type(value) is torch.Tensor for value in ours.values())
    for name, model in (("large", large), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("large", "plain")]
    assert files[0] == files[1]
    del large, ours, model
    gc.collect()
    assert not work.exists()


@pytest.mark.parametrize("family", ["llama-untied", "gemma2", "opt"])
def test_a_prefill_and_its_decode_hold_a_block_at_a_time(family):
    model = tiny_model(family, num_hidden_layers=8)
    opened = of_instance(model, None, "here", ModelSource("instance", ""))
    captured = capture_promised(opened.skeleton, opened.weights)
    promises.ledger.reset()
    before = promises.ledger.held
    found = prefill_and_decode(captured.graph_module, captured.example_inputs)
    block = sum(p.nbytes for name, p in model.named_parameters() if ".layers.0." in name)
    table = max(p.nbytes for p in model.parameters())
    assert promises.ledger.most - before < 2 * block + table
    graph_tools.settle(captured.graph_module)
    assert torch.equal(found, prefill_and_decode(captured.graph_module, captured.example_inputs))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2"])
def test_a_prefill_and_its_decode_make_lm_head_once(family, monkeypatch):
    opened = of_instance(tiny_model(family), None, "here", ModelSource("instance", ""))
    captured = capture_promised(opened.skeleton, opened.weights)
    apart = prefill_and_decode(captured.graph_module, captured.example_inputs)
    monkeypatch.setattr(promises, "TABLE", 131 * 64 * 4)
    with mock.patch.object(promises.Promise, "times", autospec=True, side_effect=promises.Promise.times) as products:
        together = prefill_and_decode(captured.graph_module, captured.example_inputs)
    assert products.call_count == 1
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)  # float32 products of other shapes


@pytest.mark.parametrize("family", ["llama-untied", "mistral", "qwen2"])
def test_a_check_turns_values_and_not_weights(family, monkeypatch):
    """Weights that transforms were fused into are not made for the few tokens of a check, and outputs are those of the weights."""
    opened = of_instance(tiny_model(family, hidden_size=256), None, "here", ModelSource("instance", ""))
    captured = capture_promised(opened.skeleton, opened.weights)
    gm = captured.graph_module
    ctx = PassContext(captured.example_inputs, tiny_tokens(4, 32))
    passes = passes_for(resolve("resq"))
    exact = passes[: [item.name for item in passes].index("partition-linears") + 1]
    pipeline = Pipeline(ctx)
    pipeline.start(gm)
    pipeline.run(gm, exact)
    monkeypatch.setattr(promises, "TABLE", 1)
    with mock.patch.object(promises.Changed, "_whole", side_effect=AssertionError("a weight was turned")):
        found = prefill_and_decode(gm, captured.example_inputs)
    graph_tools.settle(gm)
    torch.testing.assert_close(found, prefill_and_decode(gm, captured.example_inputs), rtol=1e-4, atol=1e-5)
