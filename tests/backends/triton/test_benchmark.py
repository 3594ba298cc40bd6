"""benchmarks/triton_kernels.py without a GPU: blocks that compute what they should, bytes that are counted right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from resq_compiler.backends.triton import launch, shapes
from resq_compiler.backends.triton.gpus import GPUS
from resq_compiler.backends.triton.shapes import BlockShape
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

TINY = BlockShape("tiny", 64, 4, 2, 16, 160)


@pytest.fixture(scope="module")
def benchmark():
    directory = str(Path(__file__).parents[3] / "benchmarks")
    sys.path.insert(0, directory)
    try:
        import triton_kernels
    finally:
        sys.path.remove(directory)
    return triton_kernels


@pytest.mark.parametrize(("tokens", "total"), [(6, 6), (1, 9)], ids=["prefill", "decode"])
def test_the_float_block_is_a_llama_layer(benchmark, tokens, total, generator):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160, head_dim=16
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    with shapes.allocated_on("cpu"):
        block = benchmark.Float16Block(TINY, tokens, total, torch.float32)
    for buffer in block.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    attention, mlp = layer.self_attn, layer.mlp
    pairs = [(layer.input_layernorm.weight, block.norms[0]), (layer.post_attention_layernorm.weight, block.norms[1])]
    q, k, v = block.qkv_weight.split([64, 32, 32])
    gate, up = block.gate_up_weight.split(160)
    pairs += [(attention.q_proj.weight, q), (attention.k_proj.weight, k), (attention.v_proj.weight, v)]
    pairs += [(attention.o_proj.weight, block.o_weight)]
    pairs += [(mlp.gate_proj.weight, gate), (mlp.up_proj.weight, up), (mlp.down_proj.weight, block.down_weight)]
    for parameter, value in pairs:
        parameter.data.copy_(value)
    cache = DynamicCache()
    past = total - tokens
    if past:
        cache.update(block.keys[:, :, :past].clone(), block.values[:, :, :past].clone(), 0)
    mask = torch.ones(tokens, total, dtype=torch.bool).tril(past)[None, None]
    with torch.no_grad():
        expected = layer(
            block.x, attention_mask=mask, position_embeddings=(block.cos[0], block.sin[0]), past_key_values=cache
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(block(), expected, rtol=1e-5, atol=1e-5)  # fused linears: sums in another order


def test_measuring_runs_every_kernel_and_both_blocks(benchmark, capsys):
    results = []

    def bench(call):
        with torch.no_grad():
            results.append(call())
        return 1.0

    found = benchmark.measure(TINY, 1, 9, False, "cpu", bench)
    assert len(found["kernels"]) == 9 and (found["block"], found["float16"]) == (1.0, 1.0)
    *_, down, block, half = results
    assert torch.equal(block, down) and torch.isfinite(half).all()  # the block is its kernels, one after the other
    assert "in float16 PyTorch 1000.0 us: 1.00 x" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [shapes.LLAMA3_8B, shapes.SMOLLM2_135M], ids=lambda s: s.name)
@pytest.mark.parametrize("tokens", [1, 512])
def test_bytes_are_those_of_the_operands(benchmark, shape, tokens):
    """Every tensor a launch gets, read or written once; but split kernels' scratch, the cache and absent operands."""
    costs, target = benchmark.block_costs(shape, tokens, 1024), GPUS["sm_86"]
    with launch.recording(target):
        steps = dict(benchmark.KernelBlock(shape, tokens, 1024).steps())
    for name in ("norm+quantize", "q/k/v", "o+residual", "gate/up", "act*up+H+quantize", "down+residual"):
        with launch.recording(target) as recorder:
            steps[name]()
        (made,) = recorder.launches
        arguments = dict(zip(made.kernel.arg_names, made.arguments, strict=False))
        ignored = {"p_ws", "p_count", "p_f0", "p_f1", "p_f2"}
        absent = {"p_weight": not made.options.get("HAS_WEIGHT"), "p_bias": not made.options.get("HAS_BIAS")}
        absent |= {"p_res": not made.options.get("HAS_RES")} | dict.fromkeys(
            ("p_xh", "p_wh"), not made.options.get("GROUPS_H", 1)
        )
        tensors = [
            t for k, t in arguments.items() if isinstance(t, torch.Tensor) and k not in ignored and not absent.get(k)
        ]
        assert sum(t.nbytes for t in tensors) == pytest.approx(costs[name].bytes, rel=1e-3), name


def test_measuring_needs_a_gpu(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--measure"]) == 2
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err


def test_tuning_keeps_what_is_faster(benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "_device_name", lambda device: "Test GPU")
    launch._tuned.cache_clear()
    used = []

    def call():
        used.append(launch.tiles("norm_quantize", torch.device("cuda"), (64,), dict(num_warps=1, num_stages=1)))

    def bench(function):
        function()
        tile = used[-1]
        if tile["num_warps"] == 2:
            raise RuntimeError("out of resources")
        return 0.5 if tile == dict(num_warps=8, num_stages=3) else 1.0

    benchmark._tune(call, bench)
    launch._tuned.cache_clear()  # as another process would read it
    call()
    assert used[-1] == dict(num_warps=8, num_stages=3)
    benchmark._tune(call, lambda function: function() or 1.0)  # nothing is faster now: an earlier choice stays
    launch._tuned.cache_clear()
    call()
    assert used[-1] == dict(num_warps=8, num_stages=3)
    launch._tuned.cache_clear()
