"""`resq export` writes what CompiledModel.export_onnx writes, and refuses what is not compiled."""

from __future__ import annotations

import json

from resq_compiler.cli import main


def test_export_command(compile_tiny, tmp_path, capsys):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    compiled.save_pretrained(tmp_path / "compiled")
    output = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "compiled"), "-o", str(output), "--profile", "ort", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == "ort"
    assert (output / "model.onnx").is_file() and (output / "genai_config.json").is_file()
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_export_command_refuses_other_directories(tmp_path, capsys):
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "onnx")]) == 2
    assert "not a compiled model" in capsys.readouterr().err
