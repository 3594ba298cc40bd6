"""Every profile computes what the reference backend computes: prefill, decode, all families; ONNX's own evaluator agrees."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from resq_compiler.backends.onnx import build_model
from resq_compiler.backends.onnx.session import open_session

from resq_compiler.errors import BackendError
from resq_compiler.tiny import TINY_FAMILIES
from tests.backends.onnx.conftest import example, reference, relative, visible
from tests.backends.onnx.graphs import Pad

ROUNDING = 1e-5  # float32 sums in another order
DIFFERENT = (
    "llama",
    "qwen2",
    "mistral",
    "gemma2",
    "gpt_neox",
    "opt",
)  # biases, windows, soft-caps, partial rotary, no rotary
ONE_CODE = 0.1  # a value within float32 rounding of a tie falls to the other code: one step of 15 in a tiny model


def outputs(model: onnx.ModelProto, feeds) -> list[np.ndarray]:
    return open_session(model.SerializeToString(), threads=1).run(None, feeds)


def close(got, expected, tensors, tolerance) -> bool:
    """Logits of visible tokens and cache entries of visible keys within a relative tolerance."""
    seen = visible(tensors)
    keys = tensors[1].bool().numpy()[:, None, :, None]  # cache entries of padding are never read
    assert [v.shape for v in got] == [v.shape for v in expected]
    errors = [relative(got[0][seen], expected[0][seen])]
    errors += [relative(value * keys, other * keys) for value, other in zip(got[1:], expected[1:], strict=True)]
    return max(errors) < tolerance


def token_errors(got, expected, tensors) -> np.ndarray:
    """Relative error of the logits of every visible token."""
    seen = visible(tensors)
    return np.linalg.norm((got - expected)[seen], axis=-1) / np.linalg.norm(expected[seen], axis=-1)


def other_tokens(tensors, feeds, seed):
    """The same inputs with other tokens."""
    ids = np.random.default_rng(seed).integers(0, 131, tensors[0].shape)
    return (_tensor(ids), *tensors[1:]), {**feeds, "input_ids": ids}


def assert_same(got, expected, tensors):
    assert close(got, expected, tensors, ROUNDING)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in DIFFERENT else pytest.mark.slow) for f in TINY_FAMILIES]
)
def test_ort_profile_matches_reference(compile_tiny, family):
    compiled, _ = compile_tiny(family, weight_method="rtn", lm_head_bits=8)
    model = build_model(compiled, "ort", embedding="float32")
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), threads=1)
    same = []
    for past, new in ((7, 5), (0, 6), (9, 1)):
        tensors, feeds = example(compiled, past, new)
        for seed in range(3):
            tensors, feeds = other_tokens(tensors, feeds, seed)
            got, expected = session.run(None, feeds), reference(compiled, tensors)
            assert close(got, expected, tensors, ONE_CODE)
            same += list(token_errors(got[0], expected[0], tensors) < ROUNDING)
    assert np.mean(same) > 0.9  # a flipped code moves one token and those that attend to it


@pytest.mark.parametrize("profile", ["qdq", "weight-only"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_standard_profiles_match_reference(compile_tiny, family, profile):
    compiled, _ = compile_tiny(family, weight_method="rtn", lm_head_bits=8)
    model = build_model(compiled, profile, embedding="float32")
    onnx.checker.check_model(model, full_check=True)
    assert {o.version for o in model.opset_import if o.domain == ""} == {21} and model.ir_version == 10
    tensors, feeds = example(compiled)
    assert_same(outputs(model, feeds), reference(compiled, tensors), tensors)


@pytest.mark.parametrize("options", [{"lm_head_bits": 8}, {"activation_bits": 16}], ids=str)
@pytest.mark.parametrize("profile", ["ort", "qdq", "weight-only"])
def test_exact_without_session_options(compile_tiny, profile, options):
    """ONNX Runtime must not turn a linear into a MatMulNBits, whose default rounds activations to int8 again."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", **options)
    session = onnxruntime.InferenceSession(build_model(compiled, profile, embedding="float32").SerializeToString())
    tensors, feeds = example(compiled)
    assert_same(session.run(None, feeds), reference(compiled, tensors), tensors)


OPTIONS = [
    {"o_proj_granularity": "token", "lm_head_bits": 8},
    {"activation_clip": 0.9, "kv_clip": 0.95},
    {"recipe": "resq+", "allocation": "equal", "activation_group_size": 32},
    {"recipe": "quarot", "activation_group_size": 32},
    {"recipe": "resq+", "key_basis": "head", "allocation": "equal", "site_fractions": "mlp=1/4,o=0"},
    {"recipe": "resq+", "average_bits": 4.75},
    {"recipe": "resq+", "allocation": "widths", "average_bits": 4.0},
    {"weight_bits": 3, "activation_bits": 5, "kv_bits": 6},
    {"down_proj": "block-pca"},
    pytest.param({"low_fraction": 1 / 8}, marks=pytest.mark.slow),
    {"activation_bits": 16},
    {"weight_group_size": 32},
    {"kv_bits": 16},
    pytest.param({"recipe": "quik"}, marks=pytest.mark.slow),
    pytest.param({"recipe": "quarot"}, marks=pytest.mark.slow),
]
GROUPS = {"recipe": "quarot", "activation_group_size": 32, "o_proj_granularity": "token"}


@pytest.mark.parametrize("profile", ["ort", "qdq"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_options(compile_tiny, options, profile):
    compiled, _ = compile_tiny("llama", **{"weight_method": "rtn", **options})
    model = build_model(compiled, profile, embedding="float32")
    tensors, feeds = example(compiled)
    assert_same(outputs(model, feeds), reference(compiled, tensors), tensors)


def test_weights_with_groups_are_float_products_and_told(compile_tiny, caplog):
    compiled, _ = compile_tiny("llama", weight_method="rtn", weight_group_size=32)
    with caplog.at_level(logging.WARNING, "resq_compiler"):
        model = build_model(compiled, "ort")
    assert not [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    (line,) = [r.getMessage() for r in caplog.records if "float products" in r.getMessage()]
    assert line.startswith("onnx: 14 of 14 linears (") and "weight_group_size=none" in line


def test_products_for_groups_are_told(compile_tiny, caplog):
    compiled, _ = compile_tiny("llama", weight_method="rtn", **GROUPS)
    with caplog.at_level(logging.WARNING, "resq_compiler"):
        build_model(compiled, "ort")
    (line,) = [r.getMessage() for r in caplog.records if "groups of columns" in r.getMessage()]
    assert line.startswith("onnx: ") and "up to 5 groups" in line and "activation_group_size=none" in line


@pytest.mark.parametrize("profile", ["ort", "qdq", "weight-only"])
def test_onnx_reference_evaluator_agrees(compile_tiny, profile):
    """An oracle that is neither ONNX Runtime nor ours."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    tensors, feeds = example(compiled)
    got = ReferenceEvaluator(build_model(compiled, profile, embedding="float32"), new_ops=[Pad]).run(None, feeds)
    assert_same(got, reference(compiled, tensors), tensors)


def test_integer_accumulators_are_equal(compile_tiny):
    """The ort profile's int32 accumulators are the law's: Σ (q - zp) qw, exactly."""
    from resq_compiler.ir import ops
    from resq_compiler.ir.graph_tools import get_tensor

    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    model = build_model(compiled, "ort", embedding="float32")
    product = next(n for n in model.graph.node if n.op_type == "MatMulInteger")
    quantizer = next(n for n in model.graph.node if n.output[0] == product.input[0])
    evaluator = ReferenceEvaluator(_with_outputs(model, [product.output[0], quantizer.input[0]]), new_ops=[Pad])
    _, feeds = example(compiled)
    accumulator, padded = evaluator.run(None, feeds)
    node = next(n for n in compiled.graph_module.graph.nodes if n.target is ops.quantized_linear)
    bits = node.args[0].args[1]
    weight = get_tensor(compiled.graph_module, node.args[1])
    x = padded[..., padded.shape[-1] - weight.shape[1] :]  # zeros stand in front of the low part
    assert np.abs(padded[..., : padded.shape[-1] - weight.shape[1]]).max() < 1e-30
    codes = ops.quantize(_tensor(x), bits)
    centred = codes.qdata.long() - codes.zero_point.long()
    assert np.array_equal((centred @ weight.long().T).numpy(), accumulator[..., : weight.shape[0]])


def _tensor(array):
    import torch

    return torch.from_numpy(array.copy())


def _with_outputs(model, names):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    return copy


def test_both_branches_are_visible_in_qdq(compile_tiny):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    model = build_model(compiled, "qdq")
    types = {t.name: t.data_type for t in model.graph.initializer}
    weights = Counter(types.get(n.input[0]) for n in model.graph.node if n.op_type == "DequantizeLinear")
    assert (
        weights[onnx.TensorProto.INT4] == 14 and weights[onnx.TensorProto.INT8] == 13
    )  # 2 x 7 low; 2 x 6 high and lm_head
    assert not any(n.domain for n in model.graph.node)


@pytest.mark.parametrize(
    ("recipe", "products"), [({}, 0), (GROUPS, 2 * (2 + 1 + 2 * 2 + 5) + 1)], ids=["rows", "groups"]
)
def test_ort_fuses_every_integer_product(compile_tiny, tmp_path, recipe, products):
    """With groups of 32: two products of q, k and v together, one of o, two of gate, two of up and five of down a block, and lm_head."""
    compiled, _ = compile_tiny("qwen2", weight_method="rtn", lm_head_bits=8, **recipe)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(build_model(compiled, "ort").SerializeToString(), options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = Counter(n.op_type for n in nodes)
    assert kinds["MatMulInteger"] == 0 and kinds["MatMulIntegerToFloat"] > 0
    assert not products or kinds["MatMulIntegerToFloat"] == products
    assert (
        len({n.input[2] for n in nodes if n.op_type == "MatMulIntegerToFloat"}) == 1
    )  # no scales of rows inside: one thread
    assert kinds["Attention"] == 2 and kinds["RotaryEmbedding"] == 4


def test_hadamard_is_no_large_constant(compile_tiny):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    width = compiled.config.intermediate_size
    for profile in ("ort", "qdq"):
        model = build_model(compiled, profile)
        assert not [t.name for t in model.graph.initializer if list(t.dims)[-2:] == [width, width]]


def test_output_depends_on_input(compile_tiny):
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    session = open_session(build_model(compiled, "ort").SerializeToString(), threads=1)
    _, feeds = example(compiled)
    before = session.run(None, feeds)[0]
    feeds["input_ids"] = (feeds["input_ids"] + 1) % 131
    after = session.run(None, feeds)[0]
    assert np.abs(before - after).max() > 0.1 and np.isfinite(after).all()


def test_static_scales_are_constants(compile_tiny):
    """Profile qdq computes no range at run time but those of the cache, and agrees; other profiles say that they cannot."""
    compiled, _ = compile_tiny("llama", recipe="prefixquant", kv_bits=16)
    model = build_model(compiled, "qdq", embedding="float32")
    assert not [n for n in model.graph.node if n.op_type in ("ReduceMax", "ReduceMin")]
    tensors, feeds = example(compiled)
    assert_same(outputs(model, feeds), reference(compiled, tensors), tensors)
    with pytest.raises(BackendError, match="static scales of activations are for profile qdq"):
        build_model(compiled, "ort", embedding="float32")


def test_zero_rows_stay_finite(compile_tiny):
    """A token whose embedding is all zeros has no range: scale FLT_MIN, codes at the zero point."""
    compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
    for profile in ("ort", "qdq", "weight-only"):
        model = build_model(compiled, profile, embedding="float32")
        table = next(t for t in model.graph.initializer if t.name.endswith(".table"))
        array = onnx.numpy_helper.to_array(table).copy()
        array[5] = 0
        table.CopyFrom(onnx.numpy_helper.from_array(array, table.name))
        _, feeds = example(compiled, past=0)
        feeds["input_ids"] = np.full_like(feeds["input_ids"], 5)
        assert np.isfinite(outputs(model, feeds)[0]).all()
