"""The packed KV cache holds the codes themselves: same tokens as the reference, a fraction of the memory."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from resq_compiler.backends.onnx import build_model, export_onnx
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.session import open_session

from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokens
from tests.backends.onnx.conftest import example, reference, relative


@pytest.mark.parametrize(
    "options", [{}, {"kv_bits": 3}, {"low_fraction": 1 / 8}, {"average_bits": 4.75}, {"average_bits": 4.5, "allocation": "widths"}],
    ids=["4/8 bits", "3/8 bits", "2/4/8 bits", "shared out", "widths"],
)  # fmt: skip
def test_generation_matches_reference(compile_tiny, tmp_path, options):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8, **options)
    path = export_onnx(compiled, tmp_path / "model", "ort", embedding="float32", kv_cache="packed")
    assert not (path / "genai_config.json").exists()  # onnxruntime-genai knows no such cache
    ids = tiny_tokens(2, 9, seed=12)  # no code of these lies at a tie: one that flips would change the tokens
    expected = compiled.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = OnnxDecoder(path, threads=1).generate(ids.numpy(), max_new_tokens=8, eos_token_id=[])
    assert np.array_equal(got, expected.numpy())


def test_cache_holds_the_codes(compile_tiny):
    """Unpacked in numpy by the documented layout, the cache is the float cache of the reference."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    session = open_session(
        build_model(compiled, "ort", embedding="float32", kv_cache="packed").SerializeToString(), threads=1
    )
    tensors, feeds = example(compiled, past=0)
    feeds = {k: v for k, v in feeds.items() if not k.startswith("past")}
    for entry in session.get_inputs()[3:]:
        shape = [2, entry.shape[1], 0, entry.shape[3]]
        feeds[entry.name] = np.zeros(shape, np.uint8 if "uint8" in entry.type else np.float32)
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(None, feeds), strict=True))
    data, scale = got["present.0.key"], got["present.0.key_scale"]
    assert data.shape == (2, 2, 5, 7 + 2 + 2) and scale.shape == (
        2,
        2,
        5,
        2,
    )  # 14 codes of 4 bits, 2 of 8, 2 zero points
    low = np.concatenate([data[..., :7] & 15, data[..., :7] >> 4], -1).astype(np.float32)
    image = np.concatenate(
        [
            (low - data[..., 9:10]) * scale[..., :1],
            (data[..., 7:9] - data[..., 10:11].astype(np.float32)) * scale[..., 1:],
        ],
        -1,
    )
    assert (
        relative(image, reference(compiled, tensors)[1]) < 1e-6
    )  # the same codes; scales differ by float32 rounding of the norm


def test_memory_per_token(compile_tiny):
    """At the head width of real models: 56 codes of 4 bits, 8 of 8 bits, 2 zero points, 2 scales: 46 bytes against 256."""
    from resq_compiler.backends.onnx.packed_cache import packed_bytes

    parts = ((4, 0, 56), (8, 56, 64))
    assert packed_bytes(parts) + 4 * len(parts) == 46


def test_float_cache_cannot_be_packed(compile_tiny):
    compiled, _ = compile_tiny("llama", weight_method="rtn", kv_bits=16)
    with pytest.raises(BackendError, match="kv_bits below 16"):
        build_model(compiled, kv_cache="packed")


def test_checker_accepts_it(compile_tiny):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    for profile in ("qdq", "ort"):
        onnx.checker.check_model(build_model(compiled, profile, kv_cache="packed"), full_check=True)
