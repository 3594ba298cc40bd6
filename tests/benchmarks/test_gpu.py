"""benchmarks/gpu.py without a GPU: steps, report, and what it says where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def gpu(script):
    return script("gpu")


def test_needs_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "sees no CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('noise'); print('{\"a\": 1}')", {"a": 1}),
        ("raise SystemExit('no memory')", {"error": "no memory"}),
        ("print('noise')", {"error": "its output is no JSON: Expecting value: line 1 column 1 (char 0)"}),
        ("import time; time.sleep(60)", {"error": "took longer than 2 s"}),
    ],
)
def test_a_step_ends_with_json_or_a_reason(gpu, code, expected):
    found = gpu.run_step("x", [sys.executable, "-S", "-c", code], 2 if "sleep" in code else 300)
    assert found.pop("seconds") >= 0 and found == expected


def test_how_tests_ended(gpu, tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/><testcase classname="t" name="b"><skipped message="no GPU"/></testcase>'
        '<testcase classname="t" name="c"><failure message="assert 1 == 2">trace</failure></testcase></testsuite></testsuites>'
    )
    assert gpu.read_junit(tmp_path / "r.xml") == {
        "t::a": "passed",
        "t::b": "skipped: no GPU",
        "t::c": "failure: assert 1 == 2",
    }


def test_tests_run_in_a_process_of_their_own(gpu, tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = gpu.run_pytest([tmp_path / "test_x.py"], "not gpu")
    assert found == {"test_x::test_good": "passed", "test_x::test_bad": "failure: assert 1 == 2"}


def test_the_report(gpu):
    text = gpu.markdown(
        {
            "machine": {"date": "2026-01-02", "gpu": "A GPU", "torch": "2.11"},
            "tests": {
                "tests": {"t::a": "passed", "t::b": "skipped: no", "u.C::c": "failure: 1 == 2"},
                "seconds": 1.0,
            },
            "kernels": {"error": "line\nCUDA out of memory", "seconds": 1.0},
            "compile": {
                "compile_seconds": 12.34,
                "same_tokens": True,
                "stage_seconds": {"00 capture": 1.0},
                "seconds": 20.0,
            },
        }
    )
    assert text.splitlines()[0] == "Measured 2026-01-02 on A GPU, torch 2.11"
    assert "kernels: failed: CUDA out of memory" in text
    assert "| t | 1 | 0 | 1 |" in text and "| u.C | 0 | 1 | 0 |" in text and "| u.C::c | failure: 1 == 2 |" in text
    assert "| compile seconds | 12.3 |" in text and "| same tokens | True |" in text


def test_every_test_marked_gpu_is_found(gpu):
    marked = [f for f in Path(__file__).parents[1].rglob("test_*.py") if gpu.MARK in f.read_text()]
    assert {f.name for f in marked} >= {"test_device.py", "test_decode.py", "test_quantized.py", "test_on_gpu.py"}
    kernels = Path(__file__).parents[1] / "backends" / "triton"
    assert all((kernels / f"test_{name}.py").is_file() for name in gpu.KERNELS)


@pytest.mark.slow
def test_compile_and_decode_in_the_interpreter(gpu, monkeypatch):
    tiny = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 131, "tie_word_embeddings": True}  # fmt: skip
    monkeypatch.setattr(gpu, "PROMPT", 8)
    monkeypatch.setattr(gpu, "NEW", 2)
    assert gpu.measure_compile(tiny, "cpu", windows=2, length=24)["compile_seconds"] > 0
    found = gpu.measure_decoding(tiny, "cpu")
    assert found["same_tokens"] and found["triton_steps_tokens_per_second"] > 0
