"""The whole inspection run, and its command line."""

from __future__ import annotations

import json

import pytest

from resq_compiler import recipes
from resq_compiler.cli import main
from resq_compiler.inspection.session import Request, inspect_model
from resq_compiler.tiny import tiny_model, tiny_tokens


def test_inspects_a_model_that_is_handed_over(tmp_path):
    pytest.importorskip("netron")
    pytest.importorskip("matplotlib")
    config = recipes.resolve("resq", weight_method="rtn", calibration_samples=2, calibration_length=32)
    request = Request(activations=True, levels=("kind",), tokens=512, dump_dir=tmp_path)
    found = inspect_model(tiny_model("llama"), tiny_tokens(2, 32), config, request)
    assert [table["title"].split()[0] for table in found.tables] == ["Kinds", "Outlier", "Massive", "Super", "Sites", "Cost"]
    assert {p.name for p in found.files} >= {"activations.json", "attribution.json", "channels.png", "index.html"}
    assert (tmp_path / "index.html").stat().st_size < 2 * 10**6


def test_diff_command(compiled, capsys):
    assert main(["diff", str(compiled.dump), str(compiled.dump), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_diff_command_on_what_is_not_a_dump(compiled, tmp_path, capsys):
    assert main(["diff", str(compiled.dump), str(tmp_path)]) == 2
    assert "expected a dump" in capsys.readouterr().err


def test_unknown_level(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "model", "--attribute", "layer"])
    assert "expected a list out of kind, block, linear" in capsys.readouterr().err
