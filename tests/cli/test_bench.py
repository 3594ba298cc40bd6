"""resq bench on a tiny exported model: what it reports, and what it refuses. No figure is compared with another."""

from __future__ import annotations

import json

import pytest

from resq_compiler.cli import main

pytest.importorskip("onnx", reason="the ONNX backend needs onnx")
pytest.importorskip("onnxruntime", reason="the ONNX backend needs onnxruntime")


@pytest.fixture
def directory(compile_tiny, tmp_path):
    compiled, _ = compile_tiny("llama", recipe="resq", weight_method="rtn")
    return compiled.export_onnx(tmp_path / "model", "ort")


def test_what_is_reported(directory, capsys):
    sizes = ["--prompt", "5,9", "--batch", "1,2", "--new-tokens", "3", "--rounds", "2"]
    assert main.main(["bench", str(directory), *sizes, "--operators", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["prompt"]) for row in result["speed"]] == [(1, 5), (1, 9), (2, 5), (2, 9)]
    assert all(
        row["decode_best"] >= row["decode_median"] > 0 and row["first_token_seconds"] > 0 for row in result["speed"]
    )
    calls = {row["operator"]: row["calls"] for row in result["operators"]}
    assert calls["Gather"] >= 4 and result["load_seconds"] > 0 and result["peak_bytes"] > 0


def test_as_text(directory, capsys):
    assert main.main(["bench", str(directory), "--prompt", "5", "-n", "2", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loaded in ") and lines[1].startswith("batch  prompt") and lines[-1].startswith("peak ")


def test_other_directories_are_refused(tmp_path, capsys):
    assert main.main(["bench", str(tmp_path)]) != 0
    assert "is not an exported model; make one with `resq export`" in capsys.readouterr().err
