"""Profile native, wrong inputs: a clear error, nothing half-written, never a crash."""

from __future__ import annotations

import os
import stat

import onnx
import pytest
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import export, export_onnx
from resq_compiler.backends.onnx.runtime import OnnxDecoder

from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokens


@pytest.fixture(scope="module")
def compiled(library, compile_tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "library", lambda: library)
        yield compile_tiny("llama", recipe="resq", weight_method="rtn")[0]


@pytest.fixture
def directory(compiled, tmp_path):
    return export_onnx(compiled, tmp_path / "model", "native")


@pytest.fixture
def stored_apart(compiled, tmp_path, monkeypatch):
    """An export whose tensors lie in a file of their own, as those of large models do."""
    monkeypatch.setattr(export, "EXTERNAL_DATA_ABOVE", 0)
    return export_onnx(compiled, tmp_path / "apart", "native")


def test_a_library_of_another_version(directory, monkeypatch):
    monkeypatch.setattr(libraries, "VERSION", 99)
    with pytest.raises(
        BackendError, match=r"libresq_kernels.so has interface version \d+, expected 99; export again with `--platform"
    ):
        OnnxDecoder(directory)


def test_a_model_cut_short(directory):
    whole = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackendError, match="no ONNX model or is damaged"):
        OnnxDecoder(directory)


def test_tensors_cut_short(stored_apart):
    with (stored_apart / "model.onnx.data").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(BackendError, match="cannot load the model"):
        OnnxDecoder(stored_apart)


def test_a_directory_that_cannot_be_written(compiled, tmp_path, monkeypatch):
    """Nothing is left there."""

    def full(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(export.placement, "check", full)
    with pytest.raises(BackendError, match="is not writable .*Read-only file system.*; choose another directory"):
        export_onnx(compiled, tmp_path / "model", "native")
    monkeypatch.undo()
    monkeypatch.setattr(export.shutil, "copy", full)
    with pytest.raises(BackendError, match="failed: .*Read-only file system; nothing was changed there"):
        export_onnx(compiled, tmp_path / "model", "native")
    assert list(tmp_path.iterdir()) == []


def test_without_kernels_nothing_is_written(compiled, tmp_path, monkeypatch):
    def missing():
        raise BackendError("cpu kernels: the CPU kernels are not installed: pip install ./kernels")

    monkeypatch.setattr(libraries, "library", missing)
    with pytest.raises(BackendError, match="the CPU kernels are not installed: pip install ./kernels"):
        export_onnx(compiled, tmp_path / "model", "native")
    assert not (tmp_path / "model").exists()


def test_platforms_that_cannot_be_had(compiled, tmp_path):
    with pytest.raises(BackendError, match="platform 'plan9': expected one of linux-x86_64"):
        export_onnx(compiled, tmp_path / "model", "native", platforms=["plan9"])
    with pytest.raises(BackendError, match="platforms linux-aarch64: only profile native has a library"):
        export_onnx(compiled, tmp_path / "model", "ort", platforms=["linux-aarch64"])
    assert list(tmp_path.iterdir()) == []


def test_more_threads_than_cores(directory):
    ids = tiny_tokens(1, 9, seed=12).numpy()
    options = dict(max_new_tokens=4, eos_token_id=[])
    many, one = (OnnxDecoder(directory, threads=n).generate(ids, **options) for n in (4 * (os.cpu_count() or 1), 1))
    assert many.tolist() == one.tolist()


def test_others_may_read_what_is_written(stored_apart):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in stored_apart.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert all(mode & 0o444 == 0o444 & ~umask for mode in modes.values()), modes


def test_attributes_that_do_not_fit(directory):
    """ONNX Runtime names the node."""
    path = directory / "model.onnx"
    model = onnx.load(path)
    chain = next(node for node in model.graph.node if node.op_type == "Chain" and node.attribute)
    number = next(a.name[:-5] for a in chain.attribute if a.s.startswith(b"NormLinear"))
    next(a for a in chain.attribute if a.name == f"{number}_low_bits").i = 9
    onnx.save(model, path)
    with pytest.raises(BackendError, match="attributes of a NormLinear node do not fit: expected bits 2 to 8"):
        OnnxDecoder(directory)
