"""What the demo says of speed. No figure is compared with another."""

from __future__ import annotations

import torch

from resq_compiler.cli import demo_speed
from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_model


class WithoutKernels:
    def use_backend(self, name):
        raise BackendError(f"backend {name}: the CPU kernels are not installed")


class OnKernels:
    """A float model that takes any backend."""

    def __init__(self, model):
        self.model, self.config, self.backend = model, model.config, ""

    def __call__(self, *arguments, **options):
        return self.model(*arguments, **options)

    def use_backend(self, name):
        self.backend = name


def test_without_kernels_the_reason_is_told():
    found = demo_speed.compare(None, WithoutKernels())
    assert (
        demo_speed.describe(found, "resq+") == "Speed was not measured: backend cpu: the CPU kernels are not installed"
    )


def test_both_models_are_measured(monkeypatch):
    monkeypatch.setattr(demo_speed, "ROUNDS", 1)
    model = tiny_model("llama")
    compiled = OnKernels(model)
    found = demo_speed.compare(model, compiled)
    assert compiled.backend == "cpu" and all(
        found[who][what] > 0 for who in ("float", "compiled") for what in ("prefill", "decode")
    )
    assert found["prompt"] == model.config.max_position_embeddings - demo_speed.NEW
    assert torch.is_grad_enabled()


def test_as_a_table():
    found = {
        "prompt": 512,
        "float": {"prefill": 300.0, "decode": 20.0},
        "compiled": {"prefill": 1200.0, "decode": 100.0},
    }
    lines = [line.split() for line in demo_speed.describe(found, "resq+ W4A4KV4").splitlines()]
    assert lines[0][:3] == ["tokens", "per", "second"] and lines[-1] == ["x", "4.00", "x", "5.00"]
    assert ["float32,", "PyTorch", "300", "20.0"] in lines and lines[-2][-2:] == ["1200", "100.0"]
