"""The whole inspection run, and its command line."""

from __future__ import annotations

import pytest

from resq_compiler.cli.inspect_compile import Request, inspect_model
from resq_compiler.cli.main import main
from resq_compiler.inspection.dump_files import read_manifest
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_model, tiny_tokens


def test_inspects_a_model_that_is_handed_over(tmp_path):
    pytest.importorskip("matplotlib")
    config = named.resolve("resq", weight_method="rtn", calibration_samples=2, calibration_length=32)
    request = Request(activations=True, levels=("kind",), tokens=512, dump_dir=tmp_path)
    found = inspect_model(tiny_model("llama"), tiny_tokens(2, 32), config, request)
    assert [table["title"].split()[0] for table in found.tables] == [
        "Kinds",
        "Outlier",
        "Massive",
        "Super",
        "Sites",
        "Cost",
    ]
    assert {p.name for p in found.files} >= {"activations.json", "attribution.json", "channels.png", "index.html"}
    assert (tmp_path / "index.html").stat().st_size < 2 * 10**6


def test_unknown_level(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "model", "--attribute", "layer"])
    assert "expected a list out of kind, block, linear" in capsys.readouterr().err


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """A float model on disk, without a tokenizer."""
    directory = tmp_path_factory.mktemp("float")
    tiny_model("llama").save_pretrained(directory)
    return directory


def test_compile_command_writes_a_dump(float_model, tmp_path, capsys):
    arguments = [
        str(float_model),
        "--recipe",
        "rtn",
        "--output",
        str(tmp_path / "model"),
        "--dump",
        str(tmp_path / "dump"),
    ]
    assert main(["compile", *arguments]) == 0
    assert read_manifest(tmp_path / "dump")["options"]["recipe"] == "rtn"
    assert capsys.readouterr().out.endswith(
        f"wrote {tmp_path / 'dump'}: every pass, and index.html to browse them; open it in a browser\n"
    )
    assert main(["diff", str(tmp_path / "dump"), str(tmp_path / "dump")]) == 0
    assert capsys.readouterr().out.endswith("equal: options, graphs, bits and noise\n")


@pytest.mark.parametrize("command", [["inspect"], ["compile", "--output", "never-written"]])
def test_a_dump_that_cannot_be_written_is_refused(command, float_model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*command, str(float_model), "--recipe", "rtn", "--dump", str(tmp_path / "file" / "dump")]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and "give a writable directory with free space" in error


def test_topology_needs_a_configuration_only(float_model, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((float_model / "config.json").read_bytes())
    assert main(["inspect", str(tmp_path), "--topology"]) == 0
    out = capsys.readouterr().out
    assert "residual stream: 64 channels" in out and "not fused, operators at run time" in out
