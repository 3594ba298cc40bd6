"""Microseconds of every CPU kernel at the shapes of a decoder block, alone: where the time of a block goes without a runtime around it.

    python benchmarks/cpu_operators.py                            decode and prefill of SmolLM2-135M's block, one thread
    python benchmarks/cpu_operators.py --shape qwen --threads 2   Qwen2.5-1.5B's
    python benchmarks/cpu_operators.py --library out/libresq_kernels.so --isa avx2 portable

Weights and activations are random. Times are the best of rounds in which the kernels take turns; calls are made from Python, which costs
some microseconds a call, and with more than one thread starts the threads as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from resq_compiler.backends.cpu import attention as attn
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import (
    CodePart,
    RowParts,
    hadamard_quantize,
    mixed_linear,
    norm_quantize,
    pack_linear,
)
from resq_compiler.backends.cpu.library import Library, library
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a block; an eighth of the residual stream's, of a head's and of the down projection's columns have 8 bits."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @property
    def head(self) -> CachedHead:
        return CachedHead(self.head_dim * 7 // 8, self.head_dim // 8)

    def parts(self, columns: int) -> list[CodePart]:
        return [CodePart(4, columns * 7 // 8), CodePart(8, columns // 8)]


SHAPES = {"smollm": Shape(576, 9, 3, 64, 1536, 49152), "qwen": Shape(1536, 12, 2, 128, 8960, 151936)}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def linear(kernels: Library, x: Tensor, parts: list[CodePart], channels: int, threads: int) -> Callable[[], object]:
    """A linear of random weights on the codes of x."""
    weights = []
    for p in parts:
        span = 2 ** (p.bits - 1)
        q = torch.randint(-span, span, (channels, p.width * p.groups), dtype=torch.int8)
        weights.append((q, torch.rand(channels), p.bits))
    codes = norm_quantize(kernels, x, parts)
    packed = pack_linear(weights, [p.groups for p in parts], [p.bits for p in parts])
    return lambda: mixed_linear(kernels, codes, packed, threads=threads)


def block(kernels: Library, s: Shape, rows: int, past: int, threads: int) -> dict[str, Callable[[], object]]:
    """Calls of one block, in its order."""
    x, stacked = random(rows, s.hidden), random(1, rows, (s.heads + 2 * s.kv_heads) * s.head_dim)
    widths = [n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)]
    q, k, v = (t.unflatten(-1, (-1, s.head_dim)) for t in stacked.split(widths, -1))
    cache = attn.empty_cache(1, s.kv_heads, past + rows, s.head, s.head)
    attn.rope_cache(
        kernels, *(random(1, past + rows, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads)), None, cache
    )
    cache.start.fill_(past)
    tables, basis = (random(1, rows, s.head_dim), random(1, rows, s.head_dim)), torch.eye(s.head_dim)
    heads = [CodePart(4, s.head.low, s.heads), CodePart(8, s.head.high, s.heads)]
    mask = torch.ones(1, past + rows, dtype=torch.bool)
    gate, up, parts, inner = random(rows, s.ffn), random(rows, s.ffn), s.parts(s.hidden), s.parts(s.ffn)
    queries = random(1, rows, s.heads, s.head_dim)

    def attend() -> Tensor | RowParts:
        return attn.attention(kernels, queries, cache, 0.125, mask, parts=heads, threads=threads)

    return {
        "norm": lambda: norm_quantize(kernels, x, parts, "rms", torch.ones(s.hidden), None, 1e-5, threads),
        "q/k/v": linear(kernels, x, parts, sum(widths), threads),
        "rope": lambda: attn.rope_cache(kernels, q, k, v, tables, cache, basis, threads=threads),
        "attention": attend,
        "o": linear(kernels, random(rows, widths[0]), heads, s.hidden, threads),
        "gate/up": linear(kernels, x, parts, 2 * s.ffn, threads),
        "hadamard": lambda: hadamard_quantize(kernels, gate, up, inner, "silu", False, threads),
        "down": linear(kernels, random(rows, s.ffn), inner, s.hidden, threads),
    }  # fmt: skip


def best_of(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds of the fastest call of each, the calls taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    for repeat in range(1_000_000):
        if repeat > 2 and time.perf_counter() > end:
            return best
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Time each CPU kernel alone.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--library", type=Path, help="file of the library (default: the installed one)")
    parser.add_argument("--isa", nargs="*", help="instruction sets (default: the best)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring each step (default: 1)")
    parser.add_argument("--steps", nargs="*", default=["1:128", "1:4096", "512:0"], help="ROWS:PAST")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernels = Library(arguments.library.resolve()) if arguments.library else library()
    for isa in arguments.isa or [kernels.selected]:
        with kernels.using(isa):
            for step in arguments.steps:
                rows, past = map(int, step.split(":"))
                best = best_of(
                    block(kernels, SHAPES[arguments.shape], rows, past, arguments.threads), arguments.seconds
                )
                line = "  ".join(f"{name} {1e6 * taken:.0f}" for name, taken in best.items())
                print(f"{isa:12} {rows:4} behind {past:4}: {line}  | {1e6 * sum(best.values()):.0f} us", flush=True)


if __name__ == "__main__":
    main()
