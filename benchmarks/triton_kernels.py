"""What the Triton kernels cost a decoder block: measured where there is a GPU, forecast where there is none.

    python benchmarks/triton_kernels.py                     forecast for RTX 3090, A100, H100 and B200 (Llama-3-8B and SmolLM2 blocks)
    python benchmarks/triton_kernels.py --measure           time every kernel, and the block against float16 PyTorch (needs a GPU)
    python benchmarks/triton_kernels.py --measure --tune    also try other tiles and keep the best in the user's cache

A FORECAST compiles every kernel for the target (registers, shared memory and spills are the real machine code's) and takes the larger of
bytes / bandwidth and operations / rate from the data sheet, times the waves that the grid really needs. It knows nothing of latency,
launch gaps, cache misses or clocks; float16 gets the same treatment, so ratios are fairer than times. Codes of 4 bits run at the int8
rate: Triton has no 4-bit matrix instruction.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from resq_compiler.backends.triton import aot, hadamard_quantize, launch, shapes
from resq_compiler.backends.triton.attention import attention
from resq_compiler.backends.triton.formats import PartLayout
from resq_compiler.backends.triton.mixed_linear import mixed_linear
from resq_compiler.backends.triton.norm_quantize import norm_quantize
from resq_compiler.backends.triton.rope_cache import rope_cache
from resq_compiler.backends.triton.shapes import BlockShape, meta
from resq_compiler.backends.triton.targets import TARGETS, Target

FORECAST_TARGETS = ("sm_86", "sm_80", "sm_90", "sm_100")
HEADER = "kernel                     MB      Gop  regs spill    smem   occ  waves  bound       us  fp16 us  ratio"
CANDIDATES = [dict(num_warps=w, num_stages=s) for w in (2, 4, 8) for s in (2, 3, 4)]


@dataclass(frozen=True)
class Step:
    """One launch of a block, and what float16 PyTorch does instead.

    int_ops, float_ops: operations on int8 and float16 tensor cores.    bytes, half_bytes: moved by ours and by float16.
    half_ops: float16 operations.    half_launches: kernels float16 needs.    floor: bytes of weights alone at their exact bits.
    """

    name: str
    call: Callable[[], object]
    bytes: float
    int_ops: float
    float_ops: float
    half_bytes: float
    half_ops: float
    half_launches: int
    floor: float = 0.0


def block_steps(shape: BlockShape, tokens: int, total: int) -> Iterator[Step]:
    """The launches of a decoder block for `tokens` new tokens and `total` in the cache, in order."""
    h, f, d = shape.hidden, shape.ffn, shape.head_dim
    kv = (total - tokens / 2) * 2 * shape.kv_heads * (2 * shape.cache().page_bytes / 64 / 2)
    half_kv = (total - tokens / 2) * 2 * shape.kv_heads * d * 2
    scores = 4 * shape.attention_features * tokens * (total - tokens / 2)
    parts = sum(la.row_bytes for la in shape.parts()) + 16
    norm_call = lambda: norm_quantize(meta(tokens, h), shape.parts(), "rms")  # noqa: E731
    norm = Step("norm+quantize", norm_call, tokens * (2 * h + parts), 0, 0, tokens * 4 * h, 0, 1)
    yield norm
    yield _linear("q/k/v", shape.qkv_features, shape.parts(), tokens, False, 3)
    qkv = tokens * shape.qkv_features
    u_ops = 2 * d * tokens * (shape.heads + shape.kv_heads) * d
    appended = tokens * 2 * shape.kv_heads * shape.cache().page_bytes / 64
    yield Step(
        "rope+U+append",
        lambda: _rope(shape, tokens, total),
        2 * (qkv + tokens * shape.attention_features) + appended,
        0,
        u_ops,
        4 * qkv,
        0,
        4,
    )
    codes = tokens * sum(la.row_bytes + 8 * la.groups for la in shape.head_parts())
    q_bytes = 2 * tokens * shape.attention_features
    yield Step(
        "attention+quantize",
        lambda: _attention(shape, tokens, total),
        q_bytes + kv + codes,
        0,
        scores,
        2 * q_bytes + half_kv,
        scores,
        1,
    )
    yield _linear("o+residual", h, shape.head_parts(), tokens, True, 2)
    yield norm
    yield _linear("gate/up", 2 * f, shape.parts(), tokens, False, 2)
    padded = hadamard_quantize.transform_shape(f)
    transform = (
        2 * 2 * tokens * padded["A"] * padded["B"] * padded["C"] * sum(padded[x] for x in "ABC" if padded[x] > 1)
    )
    down_bytes = sum(la.row_bytes for la in shape.down_parts()) + 8
    yield Step(
        "act*up+H+quantize",
        lambda: _hadamard(f, tokens),
        tokens * (4 * f + down_bytes),
        0,
        transform,
        tokens * 10 * f,
        0,
        2,
    )
    yield _linear("down+residual", h, shape.down_parts(), tokens, True, 2)


def _linear(
    name: str, n: int, layouts: tuple[PartLayout, ...], tokens: int, residual: bool, half_launches: int
) -> Step:
    k = sum(la.columns for la in layouts)
    groups = sum(la.groups for la in layouts)
    weights = n * (sum(la.row_bytes for la in layouts) + 4 * (len(layouts) + groups))
    activations = tokens * (sum(la.row_bytes for la in layouts) + 8 * groups + 2 * n * (2 if residual else 1))
    floor = n * sum(la.columns * la.bits / 8 for la in layouts)
    call = lambda: mixed_linear(  # noqa: E731
        *shapes.meta_activation(tokens, layouts),
        shapes.meta_weight(n, layouts),
        None,
        meta(tokens, n) if residual else None,
        torch.float16,
    )
    half = 2 * n * k + tokens * 2 * (k + n * (4 if residual else 1))
    return Step(
        name, call, weights + activations, 2.0 * tokens * n * k, 0, half, 2.0 * tokens * n * k, half_launches, floor
    )


def _rope(shape: BlockShape, tokens: int, total: int) -> object:
    d = shape.head_dim
    stacked = meta(1, tokens, shape.heads + 2 * shape.kv_heads, d)
    q, k, v = stacked.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    angles = meta(1, tokens, d, dtype=torch.float32)
    return rope_cache(
        q, k, v, angles, angles, meta(1, d, d), *shapes.meta_cache(shape, 1, total), shape.cache(), shape.cache()
    )


def _attention(shape: BlockShape, tokens: int, total: int) -> object:
    q, cache, layout = meta(1, tokens, shape.heads, shape.head_dim), shapes.meta_cache(shape, 1, total), shape.cache()
    cache[3].fill_(total - tokens)
    return attention(
        q, *cache, meta(1, total, dtype=torch.bool), layout, layout, 0.1, total, out_layouts=shape.head_parts()
    )


def _hadamard(n: int, tokens: int) -> object:
    stacked = meta(tokens, 2 * n)
    return hadamard_quantize.hadamard_quantize(stacked[:, :n], stacked[:, n:], PartLayout(4, n))


def forecast(shape: BlockShape, tokens: int, total: int, target: Target) -> dict:
    """Roofline times in seconds of every launch of a block on a target, with what its machine code says."""
    rows = []
    for step in block_steps(shape, tokens, total):
        (kernel,) = aot.compile_case(step.name, step.call, target)
        slots = max(1, round(kernel.occupancy * target.warps / kernel.warps)) * target.processors
        programs = math.prod(kernel.grid)
        idle = math.ceil(programs / slots) * slots / programs if programs > slots else 1.0
        busy = max(step.int_ops / target.int8 + step.float_ops / target.float16, 1e-12)
        memory = step.bytes / target.bandwidth
        ours, half = max(busy * idle, memory), max(step.half_bytes / target.bandwidth, step.half_ops / target.float16)
        rows.append(
            dict(
                kernel=step.name,
                mb=step.bytes / 1e6,
                gops=(step.int_ops + step.float_ops) / 1e9,
                registers=kernel.registers,
                spills=kernel.spills,
                shared=kernel.shared,
                occupancy=kernel.occupancy,
                waves=programs / slots,
                bound="bytes" if memory >= busy * idle else "ops",
                us=ours * 1e6,
                float16_us=half * 1e6,
                floor_us=step.floor / target.bandwidth * 1e6,
                float16_launches=step.half_launches,
            )
        )
    total_us, half_us = sum(r["us"] for r in rows), sum(r["float16_us"] for r in rows)
    linear = [r for r in rows if r["floor_us"]]
    return dict(
        device=target.device,
        target=target.name,
        shape=shape.name,
        tokens=tokens,
        cached=total,
        kernels=rows,
        us=total_us,
        float16_us=half_us,
        speedup=half_us / total_us,
        launches=len(rows),
        float16_launches=sum(r["float16_launches"] for r in rows),
        weights_over_floor=sum(r["us"] for r in linear) / sum(r["floor_us"] for r in linear),
        block_over_floor=total_us / sum(r["floor_us"] for r in linear),
    )


def show(result: dict) -> None:
    """Print one forecast as a table."""
    kind = "decode" if result["tokens"] == 1 else "prefill"
    where = f"{result['device']} ({result['target']})"
    print(
        f"\nFORECAST (not measured): {result['shape']} block, {kind} of {result['tokens']}, {result['cached']} cached, {where}"
    )
    print(HEADER)
    for r in result["kernels"]:
        print(
            f"{r['kernel']:20}{r['mb']:9.2f}{r['gops']:9.2f}{r['registers']:6}{r['spills']:6}{r['shared']:8}{r['occupancy']:6.2f}{r['waves']:7.1f}"
            f"{r['bound']:>7}{r['us']:9.1f}{r['float16_us']:9.1f}{r['float16_us'] / r['us']:7.2f}"
        )
    launches = f"{result['launches']} launches, float16 {result['float16_us']:.1f} us in {result['float16_launches']}"
    print(f"block: {result['us']:.1f} us in {launches}: {result['speedup']:.2f} x")
    if result["tokens"] == 1:
        linears, block = result["weights_over_floor"], result["block_over_floor"]
        print(f"over the time to read the weights once: linears {linears:.2f} x, block {block:.2f} x")


def measure(shape: BlockShape, tokens: int, total: int, tune: bool) -> None:
    """Time the kernels of a block on the GPU at hand, and the block's matrix products in float16 PyTorch."""
    from triton.testing import do_bench_cudagraph

    with shapes.allocated_on("cuda"):
        ours = half = 0.0
        for step in block_steps(shape, tokens, total):
            if tune:
                _tune(step, do_bench_cudagraph)
            ms = do_bench_cudagraph(step.call)
            ours += ms
            print(f"{shape.name} tokens={tokens} {step.name:20} {ms * 1e3:9.1f} us   {step.bytes / ms / 1e6:8.0f} GB/s")
        products = [
            (shape.qkv_features, shape.hidden),
            (shape.hidden, shape.attention_features),
            (2 * shape.ffn, shape.hidden),
            (shape.hidden, shape.ffn),
        ]
        for n, k in products:
            x, w = meta(tokens, k), meta(n, k)
            half += do_bench_cudagraph(lambda x=x, w=w: torch.nn.functional.linear(x, w))
    print(
        f"block {ours * 1e3:.1f} us; its four matrix products alone in float16 PyTorch {half * 1e3:.1f} us: {half / ours:.2f} x"
    )


def _tune(step: Step, bench: Callable) -> None:
    """Try warps and stages for a step; keep what beats the default in the tuning file."""
    chosen = launch._tuned()
    keys = launch.requested_tiles(step.call)
    for key in keys:
        best, best_ms = None, bench(step.call)
        for candidate in CANDIDATES:
            chosen[key] = candidate
            try:
                ms = bench(step.call)
            except Exception as e:  # a tile that does not fit this device is no candidate
                print(f"{key} {candidate}: {type(e).__name__}", file=sys.stderr)
                continue
            if ms < best_ms:
                best, best_ms = candidate, ms
        chosen.pop(key, None)
        if best is not None:
            chosen[key] = best
    path = launch.tuning_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen, indent=1, sort_keys=True))


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description="cost of the Triton kernels in a decoder block")
    parser.add_argument("--measure", action="store_true", help="time on the GPU at hand")
    parser.add_argument("--tune", action="store_true", help="with --measure: search tiles, keep the best")
    parser.add_argument("--json", action="store_true", help="one JSON line a forecast, instead of tables")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="forecast these only")
    options = parser.parse_args(arguments)
    work = [
        (s, tokens, total)
        for s in (shapes.LLAMA3_8B, shapes.SMOLLM2_135M)
        for tokens, total in ((2048, 2048), (1, 2048))
    ]
    if options.measure:
        if not torch.cuda.is_available():
            print("--measure needs a CUDA or ROCm device; without it, leave it out for the forecast", file=sys.stderr)
            return 2
        for shape, tokens, total in work:
            measure(shape, tokens, total, options.tune)
        return 0
    for target in options.target or FORECAST_TARGETS:
        for shape, tokens, total in work:
            result = forecast(shape, tokens, total, TARGETS[target])
            print(json.dumps(result)) if options.json else show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
