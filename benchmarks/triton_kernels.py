"""What the Triton kernels cost a decoder block: measured where there is a GPU, forecast where there is none.

    python benchmarks/triton_kernels.py                     forecast for RTX 3090, A100, H100 and B200 (Llama-3-8B and SmolLM2 blocks)
    python benchmarks/triton_kernels.py --measure           time every kernel, and the block against a float16 PyTorch block (needs a GPU)
    python benchmarks/triton_kernels.py --measure --tune    also try other tiles and keep the best in the user's cache

A FORECAST compiles every kernel for the target (registers, shared memory and spills are the real machine code's) and takes the larger of
bytes / bandwidth and operations / rate from the data sheet, times the waves that the grid really needs. It knows nothing of cache
misses or clocks; float16 gets the same treatment, so ratios are fairer than times. Codes of 4 bits run at the int8 rate: Triton has no
4-bit matrix instruction. A second figure lets no launch take less than 2 us (an assumption: a short kernel inside a CUDA graph),
which is what decides about decoding on fast GPUs and about small models. What an H100 expands before a launch of many rows is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from resq_compiler.backends.triton import aot, hadamard_quantize, launch, shapes
from resq_compiler.backends.triton.formats import PAGE, PartLayout
from resq_compiler.backends.triton.gpus import GPUS, Gpu
from resq_compiler.backends.triton.shapes import BlockShape
from triton_blocks import Float16Block, KernelBlock, on_device

FORECAST_TARGETS = ("sm_86", "sm_80", "sm_90", "sm_100")
HEADER = "kernel                     MB      Gop  regs spill    smem   occ  waves  bound       us  fp16 us  ratio"
CANDIDATES = [dict(num_warps=w, num_stages=s) for w in (2, 4, 8) for s in (2, 3, 4)]
SHORTEST_US = 2.0


@dataclass(frozen=True)
class Cost:
    """What a launch moves and computes, and what float16 PyTorch does instead.

    int_ops, float_ops: operations on int8 and float16 tensor cores.    bytes, half_bytes: moved by ours and by float16.
    half_ops: float16 operations.    half_launches: kernels float16 needs.    floor: bytes of weights alone at their exact bits.
    """

    bytes: float
    int_ops: float
    float_ops: float
    half_bytes: float
    half_ops: float
    half_launches: int
    floor: float = 0.0


def block_costs(shape: BlockShape, tokens: int, total: int) -> dict[str, Cost]:
    """The cost of every launch of a block, by its name in `KernelBlock.steps`."""
    h, f = shape.hidden, shape.ffn
    seen = total - tokens / 2  # tokens of the cache that a query reads, on average
    cached = shape.kv_heads * (shape.cache().page_bytes / PAGE)  # bytes a token, of keys or of values
    scores = 4 * shape.attention_features * tokens * seen
    parts = sum(la.row_bytes for la in shape.parts()) + 16
    qkv, q = tokens * shape.qkv_features, tokens * shape.attention_features
    basis = 2 * shape.head_dim * tokens * (shape.heads + shape.kv_heads) * shape.head_dim
    codes = tokens * sum(la.row_bytes + 8 * la.groups for la in shape.head_parts())
    down = sum(la.row_bytes for la in shape.down_parts()) + 8
    half_kv = seen * 4 * shape.kv_heads * shape.head_dim
    return {
        "norm+quantize": Cost(tokens * (2 * h + parts), 0, 0, tokens * 4 * h, 0, 1),
        "q/k/v": _linear(shape.qkv_features, shape.parts(), tokens, False, 3),
        "rope+U+append": Cost(2 * (qkv + q) + 2 * tokens * cached, 0, basis, 4 * qkv, 0, 4),
        "attention+quantize": Cost(2 * q + 2 * seen * cached + codes, 0, scores, 4 * q + half_kv, scores, 1),
        "o+residual": _linear(h, shape.head_parts(), tokens, True, 2),
        "gate/up": _linear(2 * f, shape.parts(), tokens, False, 2),
        "act*up+H+quantize": Cost(tokens * (4 * f + down), 0, _transform_ops(f, tokens), tokens * 10 * f, 0, 2),
        "down+residual": _linear(h, shape.down_parts(), tokens, True, 2),
    }


def _transform_ops(n: int, tokens: int) -> float:
    """Float16 operations of the Hadamard transform: padded, two products (upper and lower half) for each factor."""
    padded = [size for key, size in hadamard_quantize.transform_shape(n).items() if key in "ABC"]
    return 2 * 2 * tokens * math.prod(padded) * sum(size for size in padded if size > 1)


def _linear(n: int, layouts: tuple[PartLayout, ...], tokens: int, residual: bool, half_launches: int) -> Cost:
    k = sum(la.columns for la in layouts)
    groups = sum(la.groups for la in layouts)
    weights = n * (sum(la.row_bytes for la in layouts) + 4 * (len(layouts) + groups))
    activations = tokens * (sum(la.row_bytes for la in layouts) + 8 * groups + 2 * n * (2 if residual else 1))
    floor = n * sum(la.columns * la.bits / 8 for la in layouts)
    half = 2 * n * k + tokens * 2 * (k + n * (4 if residual else 1))
    ops = 2.0 * tokens * n * k
    return Cost(weights + activations, ops, 0, half, ops, half_launches, floor)


def forecast(shape: BlockShape, tokens: int, total: int, target: Gpu) -> dict:
    """Roofline times in seconds of every launch of a block on a target, with what its machine code says."""
    rows, costs, compiled = [], block_costs(shape, tokens, total), {}
    with launch.recording(target):
        steps = KernelBlock(shape, tokens, total).steps()
    for name, call in steps:
        if name not in compiled:
            *_, compiled[name] = aot.compile_case(name, call, target)
        step, kernel = costs[name], compiled[name]
        slots = max(1, round(kernel.occupancy * target.warps / kernel.warps)) * target.processors
        programs = math.prod(kernel.grid)
        idle = math.ceil(programs / slots) * slots / programs if programs > slots else 1.0
        busy = max(step.int_ops / target.int8 + step.float_ops / target.float16, 1e-12)
        memory = step.bytes / target.bandwidth
        ours, half = max(busy * idle, memory), max(step.half_bytes / target.bandwidth, step.half_ops / target.float16)
        rows.append(
            dict(
                kernel=name,
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
    floor_us, launched_us = sum(r["floor_us"] for r in linear), sum(max(r["us"], SHORTEST_US) for r in rows)
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
        weights_over_floor=sum(r["us"] for r in linear) / floor_us,
        block_over_floor=total_us / floor_us,
        launched_us=launched_us,
        launched_speedup=sum(max(r["float16_us"], r["float16_launches"] * SHORTEST_US) for r in rows) / launched_us,
        launched_over_floor=launched_us / floor_us,
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
    decoding = result["tokens"] == 1
    if decoding:
        linears, block = result["weights_over_floor"], result["block_over_floor"]
        print(f"over the time to read the weights once: linears {linears:.2f} x, block {block:.2f} x")
    over = f", {result['launched_over_floor']:.2f} x that time" if decoding else ""
    print(
        f"at {SHORTEST_US} us a launch or more: block {result['launched_us']:.1f} us{over}, {result['launched_speedup']:.2f} x float16"
    )


def measure(
    shape: BlockShape, tokens: int, total: int, tune: bool, device: str = "cuda", bench: Callable | None = None
) -> dict:
    """Time every kernel of a block, the whole block, and the block in float16 PyTorch, in milliseconds."""
    bench = bench or _bench
    block, costs = on_device(KernelBlock, shape, tokens, total, device), block_costs(shape, tokens, total)
    print(f"\n{shape.name} block, {tokens} new tokens, {total} in the cache")
    rows = {}
    for i, (name, call) in enumerate(block.steps()):
        if tune:
            _tune(call, bench)
        ms = rows[f"{i} {name}"] = bench(call)
        print(f"{name:20}{ms * 1e3:9.1f} us{costs[name].bytes / ms / 1e6:9.0f} GB/s")
    ours = bench(block)
    half = bench(on_device(Float16Block, shape, tokens, total, device))
    print(f"whole block {ours * 1e3:.1f} us, in float16 PyTorch {half * 1e3:.1f} us: {half / ours:.2f} x")
    return dict(kernels=rows, block=ours, float16=half)


def _bench(call: Callable) -> float:
    """Milliseconds of a call inside a CUDA graph, so that launches from Python do not count."""
    from triton.testing import do_bench_cudagraph

    with torch.no_grad():
        return do_bench_cudagraph(call)


def _tune(call: Callable, bench: Callable) -> None:
    """Try warps and stages for a call; keep in the tuning file what beats the default, or what an earlier run chose."""
    chosen = launch._tuned()
    for key in launch.requested_tiles(call):
        best, best_ms = chosen.get(key), bench(call)
        for candidate in CANDIDATES:
            chosen[key] = candidate
            try:
                ms = bench(call)
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
    parser.add_argument("--target", action="append", choices=sorted(GPUS), help="forecast these only")
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
            result = forecast(shape, tokens, total, GPUS[target])
            print(json.dumps(result)) if options.json else show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
