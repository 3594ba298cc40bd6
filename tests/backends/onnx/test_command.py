"""`resq export` writes what CompiledModel.export_onnx writes, and refuses what is not compiled."""

from __future__ import annotations

import json

import pytest
from resq_compiler.backends.onnx.runtime import OnnxDecoder

from resq_compiler.cli.main import main
from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokenizer


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


@pytest.fixture(scope="module")
def saved(compile_tiny, tmp_path_factory):
    """A compiled directory with a tokenizer and its exported directory."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    place = tmp_path_factory.mktemp("generate")
    compiled.save_pretrained(place / "compiled")
    tiny_tokenizer().save_pretrained(place / "compiled")
    assert main(["export", str(place / "compiled"), "-o", str(place / "onnx"), "--profile", "ort",
                 "--embedding", "float32", "-q"]) == 0  # fmt: skip
    return place


def text_of(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "-p", "Python is", "-n", "6", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def test_generate_agrees_between_backends_and_the_exported_directory(saved, capsys):
    expected = text_of(capsys, saved / "compiled")
    assert text_of(capsys, saved / "compiled", "--backend", "onnx") == expected
    assert text_of(capsys, saved / "onnx") == expected


def test_generate_streams_an_exported_directory(saved, capsys):
    assert main(["generate", str(saved / "onnx"), "-p", "Python is", "-n", "6"]) == 0
    streams = capsys.readouterr()
    assert streams.out.strip() == text_of(capsys, saved / "onnx").strip() and "tokens/s" in streams.err


def test_generate_samples_an_exported_directory(saved, capsys):
    hot = ("--temperature", "3", "--seed")
    assert text_of(capsys, saved / "onnx", *hot, "1") == text_of(capsys, saved / "onnx", *hot, "1")
    assert text_of(capsys, saved / "onnx", *hot, "1") != text_of(capsys, saved / "onnx", *hot, "2")


def test_generate_of_an_export_refuses_other_backends(saved, capsys):
    assert main(["generate", str(saved / "onnx"), "-p", "x", "--backend", "triton"]) == 2
    assert "only onnx runs" in capsys.readouterr().err


def test_directory_without_tokenizer(saved, tmp_path):
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).write_bytes((saved / "onnx" / name).read_bytes())
    with pytest.raises(BackendError, match="no tokenizer can be read"):
        _ = OnnxDecoder(tmp_path, threads=1).tokenizer


def test_eval_of_an_exported_directory(saved, capsys):
    """The numbers of the compiled model, as far as rounding goes; what it is and its size on disk."""
    arguments = ["--text", "demo", "--windows", "2", "--length", "24", "--no-noise"]
    found = []
    for words in (["compiled"], ["onnx"], ["onnx", "--backend", "onnx"]):
        capsys.readouterr()
        assert main(["eval", str(saved / words[0]), *words[1:], *arguments, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["model"]["perplexity"] == pytest.approx(found[0]["model"]["perplexity"], rel=2e-2)
    assert found[2]["model"]["nll"] == found[1]["model"]["nll"]
    assert found[1]["model_stored_bytes"] == (saved / "onnx" / "model.onnx").stat().st_size
    assert main(["eval", str(saved / "onnx"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "(exported, profile ort), 2 windows of 24 tokens" in out and "size on disk" in out
    assert main(["eval", str(saved / "onnx"), *arguments, "--backend", "triton"]) == 2
    assert "only onnx runs" in capsys.readouterr().err
