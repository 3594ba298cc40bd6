"""Around a launch: what is missing and what to do about it, tuned tiles, devices."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from resq_compiler.backends import load_backend
from resq_compiler.backends.fused.kernels import Norm
from resq_compiler.backends.triton import launch, norm_quantize
from resq_compiler.backends.triton.formats import PartLayout
from resq_compiler.backends.triton.gpus import GPUS
from resq_compiler.backends.triton.mixed_linear import decode_tiles

from resq_compiler import api
from resq_compiler.errors import BackendError

GPU = torch.device("cuda")  # a name; no GPU is needed to ask for its tiles


@pytest.fixture
def cached_tiles(tmp_path, monkeypatch):
    """Write a tuning file for a GPU called "Test GPU"; the cache of the process is left as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "_device_name", lambda device: "Test GPU")
    launch._tuned.cache_clear()

    def write(text: str) -> None:
        path = launch.tuning_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        launch._tuned.cache_clear()

    yield write
    launch._tuned.cache_clear()


def test_tuned_tiles_are_used_for_their_kernel_gpu_and_shape(cached_tiles):
    default = dict(num_warps=4, num_stages=1)
    assert launch.tiles("norm_quantize", GPU, (576,), default) == default
    cached_tiles(json.dumps({launch.tuning_key("norm_quantize", "Test GPU", 576): {"num_warps": 2}}))
    assert launch.tiles("norm_quantize", GPU, (576,), default) == dict(num_warps=2, num_stages=1)
    assert launch.tiles("norm_quantize", GPU, (4096,), default) == default
    assert launch.tiles("mixed_linear", GPU, (576,), default) == default
    assert launch.tiles("norm_quantize", torch.device("cpu"), (576,), default) == default


def test_the_file_is_read_once(cached_tiles, monkeypatch):
    cached_tiles("{}")
    launch.tiles("norm_quantize", GPU, (576,), {})
    launch.tuning_file().unlink()
    assert launch.tiles("norm_quantize", GPU, (576,), {}) == {}
    assert launch._tuned.cache_info().misses == 1


def test_a_kernels_own_choice_goes_through_the_cache(cached_tiles, monkeypatch):
    monkeypatch.setattr(launch, "_device_processors", lambda device: 82)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    strides = dict(STRIDE_L=1792, GROUPS_L=1, STRIDE_H=512, GROUPS_H=1)
    usual = decode_tiles(1, 6144, strides, GPU)
    cached_tiles(json.dumps({"mixed_linear_decode/Test GPU/1x6144x1792x512": {"num_stages": 5}}))
    assert decode_tiles(1, 6144, strides, GPU) == usual | dict(num_stages=5)


def test_a_damaged_file_is_an_error_that_names_it(cached_tiles):
    cached_tiles("{not json")
    with pytest.raises(BackendError, match="triton_tiles.json: not readable as JSON .* delete it"):
        launch.tiles("norm_quantize", GPU, (576,), {})


def test_without_triton(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(BackendError, match=r"backend triton: .* pip install 'triton>=3.9'; use backend='reference'"):
        load_backend("triton")
    with pytest.raises(BackendError, match="not installed"):  # before any work: there is no such model
        api.compile("no/such/model", backend="triton")


def test_without_a_gpu(monkeypatch, compiled):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "backend triton: torch sees no CUDA or ROCm device; .* backend='onnx' .* TRITON_INTERPRET=1 .* use backend='reference'"
    model = compiled("llama", recipe="resq", weight_method="rtn")
    with pytest.raises(BackendError, match=message):
        model.use_backend("triton")
    assert model.backend == "reference"  # as it was


def test_operands_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        BackendError, match=r"norm_quantize: operands are on the CPU; move the model with .to\('cuda'\)"
    ):
        norm_quantize.norm_quantize(torch.zeros(2, 8), (PartLayout(4, 8),))


def test_operands_on_two_devices():
    with pytest.raises(BackendError, match="x on cpu, weight on meta; move the model and its inputs together"):
        norm_quantize.norm_quantize(torch.zeros(2, 8), (PartLayout(4, 8),), Norm("rms", torch.ones(8, device="meta")))


def test_unknown_backends_and_options():
    with pytest.raises(BackendError, match="expected one of reference, onnx, cpu, triton, auto; got 'cuda'"):
        load_backend("cuda")
    with pytest.raises(BackendError, match=r"options \['half'\]; it takes dtype, allow_fallback"):
        load_backend("triton", half=True)
    assert load_backend("triton", dtype=torch.float16).dtype == torch.float16


def test_recording_decides_as_on_the_target():
    x = torch.empty(8, 64, dtype=torch.float16, device="meta")
    with launch.recording(GPUS["sm_86"]) as recorder:
        assert launch.isa() == "ptx" and launch.processors(x.device) == 82 and launch.capability(x.device) == 86
        norm_quantize.norm_quantize(x, (PartLayout(4, 56), PartLayout(8, 8)), Norm("rms"))
    (made,) = recorder.launches
    assert made.grid == (8,) and made.options["NORM"] == 1
    assert launch.isa() == "generic"
