from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from resq_compiler.calibration import executor, precision
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_model, tiny_tokens

BFLOAT16_STEP = 2**-8  # relative distance of neighbours
SHORT = {"calibration_samples": 4, "calibration_length": 32}


def run(function, *tensors):
    """The value of one node that calls `function`."""
    graph = Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(tensors))]
    node = graph.call_function(function, tuple(inputs))
    graph.output((node,))
    env = dict(zip(inputs, tensors, strict=True))
    executor.Schedule(GraphModule({}, graph), [node], inputs).run(env)
    return env[node]


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 64), (16, 64), (16,)))
    return x, w, b


def test_linears_round_their_operands_and_nothing_else(operands):
    x, w, b = operands
    with precision.linears_in("bfloat16"):
        found = run(aten.linear.default, x, w, b)
        product = run(aten.mul.Tensor, x, x)
    exact = F.linear(x.bfloat16().double(), w.bfloat16().double())
    error = ((found - b).double() - exact).abs() / exact.abs().clamp_min(1)
    assert found.dtype == torch.float32 and float(error.max()) < BFLOAT16_STEP
    assert torch.equal(product, x * x)


def test_codes_lose_nothing_and_scales_stay_float32(operands):
    x, _, _ = operands
    x = x.bfloat16().float()  # so that only scales and the result could be rounded
    codes = torch.arange(-128, 128, dtype=torch.int8).reshape(4, 64)
    scale = torch.tensor([1.001, 0.3, 1e-3, 7.0])
    with precision.linears_in("bfloat16"):
        found = run(ops.weight_only_linear, x, codes, scale)
    whole = F.linear(x.double(), codes.double()).to(torch.bfloat16).float() * scale
    assert relative_error(found, whole) < 1e-3  # a sum at a tie may be rounded the other way


def test_what_only_linears_read_is_kept_as_they_round_it(operands):
    x, w, b = operands
    graph = Graph()
    alone, shared, weight, bias = map(graph.placeholder, ("alone", "shared", "weight", "bias"))
    linears = [graph.call_function(aten.linear.default, (node, weight, bias)) for node in (alone, shared)]
    graph.output((*linears, graph.call_function(aten.neg.default, (shared,))))
    assert precision.rounded(alone, x) is x
    with precision.linears_in("bfloat16"):
        assert (
            torch.equal(precision.rounded(alone, x), x.bfloat16())
            and precision.rounded(weight, w).dtype == torch.bfloat16
        )
        assert (
            precision.rounded(shared, x) is x
            and precision.rounded(bias, b) is b
            and precision.rounded(alone, (x,)) == (x,)
        )


def test_float32_is_the_operator_itself(operands):
    x, w, b = operands
    with precision.linears_in("float32"):
        assert torch.equal(run(aten.linear.default, x, w, b), F.linear(x, w, b))


def test_the_dtype_ends_with_the_block_also_after_an_error(operands):
    x, w, b = operands
    with pytest.raises(RuntimeError, match="stop"), precision.linears_in("bfloat16"):
        raise RuntimeError("stop")
    assert torch.equal(run(aten.linear.default, x, w, b), F.linear(x, w, b))


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_the_processor_has(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert precision.resolve("auto") == ("bfloat16" if native else "float32")
    assert precision.resolve("bfloat16") == "bfloat16"


def test_a_compile_says_so_and_stays_close():
    from resq_compiler.api import compile

    ids = tiny_tokens(4, 32)
    wide, narrow = (
        compile(tiny_model("llama"), ids, recipe="resq", weight_bits=8, activation_bits=8, kv_bits=8, calibration_dtype=dtype, **SHORT)
        for dtype in ("float32", "bfloat16")
    )  # fmt: skip
    assert not any("bfloat16" in note for note in wide.notes)
    assert any("bfloat16" in note and "calibration_dtype=float32" in note for note in narrow.notes)
    assert narrow.options.calibration_dtype == "bfloat16"
    with torch.no_grad():
        assert relative_error(narrow(ids).logits, wide(ids).logits) < 0.05  # 8-bit noise of two draws


def test_a_value_is_rounded_once_for_all_that_read_it_and_forgotten_with_it(operands):
    x, w, _ = operands
    with precision.linears_in("bfloat16"):
        linear = precision.substitutes()[aten.linear.default]
    first, second = linear(x, w), linear(x, w)
    assert torch.equal(first, second) and torch.equal(first, F.linear(x.bfloat16(), w.bfloat16()).float())
    kept = linear.__self__.values
    assert len(kept) == 1
    own = x.clone()
    linear(own, w)
    assert len(kept) == 2
    del own
    assert len(kept) == 1
