"""Names of devices, and where things are computed."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import ConfigError
from resq_compiler.util import devices


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), (None, "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("cpu:0", "cpu"), (1, "cuda:1")],
)  # fmt: skip
def test_names(two_gpus, name, expected):
    assert devices.resolve(name) == torch.device(expected)


def test_auto_without_a_gpu(no_gpu):
    assert devices.resolve("auto") == devices.CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:2"])
def test_no_such_device(two_gpus, name):
    with pytest.raises(ConfigError, match="device.*expected .*cuda"):
        devices.resolve(name)


def test_what_there_is_instead(two_gpus, monkeypatch):
    with pytest.raises(
        ConfigError, match="device cuda:7: this machine has 2 CUDA devices; expected auto, cpu, cuda:0, cuda:1"
    ):
        devices.resolve("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError,
        match="device cuda: (no CUDA device is found here|this PyTorch .* without CUDA); expected auto, cpu$",
    ):
        devices.resolve("cuda")


def test_on_the_cpu_nothing_is_moved():
    x = torch.ones(2)
    with devices.computing_on(devices.CPU):
        assert devices.current() is None and devices.here(x) is x


def test_computing_elsewhere_ends():
    with devices.computing_on(torch.device("meta")):
        assert devices.here(torch.ones(2)).is_meta
    assert devices.current() is None
