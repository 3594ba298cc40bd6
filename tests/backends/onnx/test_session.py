"""Sessions leave the thread that calls them as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types

import onnx
import pytest
import torch
from resq_compiler.backends.onnx import session as ort
from resq_compiler.backends.onnx.backend import OnnxRunner
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.shared_buffers import BoundSession

from resq_compiler.errors import BackendError
from resq_compiler.util.torch_state import denormals, flushes_denormals

FIRST = """
import sys
from resq_compiler.backends.onnx import session
from resq_compiler.errors import BackendError
from resq_compiler.util.torch_state import flushes_denormals
opened = session.open_session(sys.argv[1])
assert session.recommended_options(opened.get_modelmeta().custom_metadata_map) == {"session.set_denormal_as_zero": "1"}
assert not flushes_denormals()
"""


@pytest.fixture(scope="module")
def exported(compile_tiny, tmp_path_factory):
    compiled, _ = compile_tiny("llama", weight_method="rtn")
    return compiled.export_onnx(tmp_path_factory.mktemp("session") / "onnx", "ort")


def test_the_first_session_of_a_process(exported):
    done = subprocess.run([sys.executable, "-c", FIRST, exported / "model.onnx"], timeout=300, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("before", [False, True])
def test_denormals_after_a_run(exported, before):
    with denormals(before):
        OnnxDecoder(exported).generate([[3, 4, 5]], max_new_tokens=2)
        assert flushes_denormals() == before


@pytest.mark.parametrize("entry", ["0", "1", None])
def test_denormals_during_a_run(entry):
    """As the session's own threads, by each of the three ways to run one."""
    seen = []

    def option(name):
        if entry is None:
            raise RuntimeError(f"{name} is not set")
        return entry

    fake = types.SimpleNamespace(
        get_session_options=lambda: types.SimpleNamespace(get_session_config_entry=option),
        run_with_ort_values=lambda names, inputs: seen.append(flushes_denormals()) or [],
        run_with_iobinding=lambda binding: seen.append(flushes_denormals()),
        get_inputs=list, get_outputs=lambda: [types.SimpleNamespace(name="logits", shape=[1, 1, 3])], get_overridable_initializers=list,
        io_binding=lambda: None,
    )  # fmt: skip
    with denormals(entry != "1"):
        OnnxRunner(fake).run([])
        with pytest.raises(ValueError, match="zip"):
            ort.run(fake, {})
        BoundSession(fake)._run()
        assert flushes_denormals() == (entry != "1")
    assert seen == [entry == "1"] * 3
    assert (torch.tensor(1e-40) * 1 == 0) == flushes_denormals()


@pytest.mark.parametrize("written", ["{", "[]", '{"a": 1}', b"\xff\xfe{"])
def test_damaged_session_options(written):
    with pytest.raises(BackendError, match="resq.session_options.*expected a JSON object of texts.*write it again"):
        ort.recommended_options({"resq.session_options": written})


def test_damaged_metadata(exported, tmp_path):
    """Of a real model: bytes that are no text, and a number that is none."""
    directory = tmp_path / "onnx"
    shutil.copytree(exported, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    model.metadata_props.add(key="resq.longest_text", value="12x")
    onnx.save(model, directory / "model.onnx")
    with pytest.raises(BackendError, match="resq.longest_text in the metadata.*expected a number, got '12x'"):
        OnnxDecoder(directory)
    content = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(content.replace(b"12x", b"\xff\xfe\xff"))
    with pytest.raises(BackendError, match="damaged"):
        OnnxDecoder(directory)
