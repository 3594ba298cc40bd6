"""What the CPU kernels reach: linears alone against PyTorch float32, and decoder blocks against ONNX Runtime float32.

    python benchmarks/cpu_kernels.py                        linears of SmolLM2-135M and of 4096 x 4096, one thread, every instruction set
    python benchmarks/cpu_kernels.py --blocks 8             blocks and lm_head of SmolLM2-135M's shape in ONNX Runtime, interleaved rounds

Weights are random. Blocks have nine operators: norm, linear, rope, attention, linear, norm, linear, Hadamard, linear; the float32 graph has
ONNX Runtime's own fused operators (GroupQueryAttention, SimplifiedLayerNormalization). Times are the best and the median of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import CodePart, LinearWeight, mixed_linear, norm_quantize, pack_linear
from resq_compiler.backends.cpu.library import library

HIDDEN, HEADS, KV_HEADS, D, FFN, VOCABULARY = 576, 9, 3, 64, 1536, 49152
HEAD = CachedHead(56, 8)
LINEARS = {
    "q/k/v": (504, 72, 960),
    "o": (504, 72, 576),
    "gate/up": (504, 72, 3072),
    "down": (1536, 0, 576),
    "4096 x 4096": (3584, 512, 4096),
}
"""Columns at 4 bits, columns at 8 bits, outputs."""


def rounds(functions: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Seconds of every call, the functions taking turns."""
    taken: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 3:
        for function, times in zip(functions, taken, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return taken


def random_weight(low: int, high: int, channels: int, groups: int = 1) -> LinearWeight:
    """Codes of 4 and 8 bits with small scales; low and high are columns of one group."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for width, bits in ((low, 4), (high, 8)):
        if width:
            span = 2 ** (bits - 1)
            q = torch.randint(-span, span, (channels, width * groups), dtype=torch.int8, generator=generator)
            parts.append((q, torch.full((channels,), 0.02 / span), bits))
    return pack_linear(parts, (groups,) * len(parts), [bits for _, _, bits in parts])


def linears(seconds: float) -> None:
    """Rates of single linears on one thread."""
    torch.set_num_threads(1)
    kernels = library()
    able = [name for name, supported in kernels.instruction_sets().items() if supported]
    print(f"{'linear':12} rows   float32" + "".join(f"{name:>26}" for name in able))
    for name, (low, high, channels) in LINEARS.items():
        weight, columns = random_weight(low, high, channels), low + high
        dense = torch.randn(channels, columns)
        for rows in (1, 128, 512):
            x = torch.randn(rows, columns)
            codes = norm_quantize(kernels, x, [CodePart(4, low), *([CodePart(8, high)] if high else [])])
            line, work = f"{name:12} {rows:4}", 2e-9 * rows * columns * channels
            for isa in able:
                with kernels.using(isa):
                    ours = lambda c=codes, w=weight: mixed_linear(kernels, c, w)  # noqa: E731
                    float32 = lambda a=x, b=dense: torch.nn.functional.linear(a, b)  # noqa: E731
                    best, base = (min(times) for times in rounds([ours, float32], seconds))
                line += f"{work / base:7.0f} GF" if isa == able[0] else ""
                line += f"{work / best:9.0f} GOP/s ({base / best:5.2f} x)"
            print(line, flush=True)


class Graph:
    """An ONNX graph under construction: a chain of nodes with random constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def input(self, name: str, kind: int, shape: list) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: list) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def op(self, name: str, *inputs: str, outputs: int = 1, domain: str = "resq", **attributes) -> list[str]:
        made = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(name, inputs, made, domain=domain, **attributes))
        return made

    def session(self, threads: int, custom: str | None) -> ort.InferenceSession:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        sets = [helper.make_opsetid(d, v) for d, v in (("", 21), ("resq", 1), ("com.microsoft", 1))]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if custom:
            options.register_custom_ops_library(custom)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def mixed(g: Graph, codes: list[str], weight: LinearWeight, residual: str = "", **widths: int) -> str:
    """A MixedLinear node; widths of parts that are not there are 0."""
    tiles = list(weight.tiles)
    low = tiles.pop(0) if widths.get("low_width") else torch.empty(0, dtype=torch.uint8)
    high = tiles.pop(0) if widths.get("high_width") else torch.empty(0, dtype=torch.uint8)
    operands = [g.constant(t.numpy()) for t in (low, high, weight.scale, weight.row_sum)]
    return g.op("MixedLinear", *codes, *operands, "", residual, **widths)[0]


def native_graph(blocks: int) -> Graph:
    """Nine operators a block, and lm_head in 8 bits for the last token."""
    g = Graph()
    x = g.input("x", TensorProto.FLOAT, [1, "S", HIDDEN])
    cos, sin = (g.input(name, TensorProto.FLOAT, [1, "S", D]) for name in ("cos", "sin"))
    mask = g.input("mask", TensorProto.BOOL, [1, "T"])
    norm = dict(norm=1, epsilon=1e-5, low_width=504, high_width=72)
    heads = dict(low_width=56, high_width=8, value_low_width=56, value_high_width=8, heads=HEADS, kv_heads=KV_HEADS)
    gain, basis = g.constant(np.ones(HIDDEN, np.float32)), g.constant(np.eye(D, dtype=np.float32))
    for i in range(blocks):
        past = [g.input(f"past{i}{kind}", TensorProto.UINT8, [1, KV_HEADS, "P", HEAD.row_bytes]) for kind in "kv"]
        codes = g.op("NormQuantize", x, gain, outputs=4, **norm)
        qkv = mixed(g, codes, random_weight(504, 72, 960), low_width=504, high_width=72)
        q, *present = g.op("RopeCache", qkv, cos, sin, *past, mask, basis, outputs=3, **heads)
        for name in present:
            g.output(name, TensorProto.UINT8, [1, KV_HEADS, "T", HEAD.row_bytes])
        codes = g.op("AttentionQuantize", q, *present, mask, outputs=4, scale=0.125, **heads)
        heads_out = dict(low_width=56, high_width=8, low_groups=HEADS, high_groups=HEADS)
        x = mixed(g, codes, random_weight(56, 8, HIDDEN, HEADS), x, **heads_out)
        codes = g.op("NormQuantize", x, gain, outputs=4, **norm)
        gate_up = mixed(g, codes, random_weight(504, 72, 2 * FFN), low_width=504, high_width=72)
        dense = g.constant(hadamard_factor())
        codes = g.op(
            "HadamardQuantize",
            gate_up,
            "",
            dense,
            outputs=4,
            activation=1,
            stacked=1,
            low_width=FFN,
            low_order0=48,
            low_order1=32,
        )
        x = mixed(g, codes, random_weight(FFN, 0, HIDDEN), x, low_width=FFN)
    codes = g.op("NormQuantize", last_token(g, x), gain, outputs=4, **(norm | dict(low_width=0, high_width=HIDDEN)))
    g.output(
        mixed(g, codes, random_weight(0, HIDDEN, VOCABULARY), high_width=HIDDEN), TensorProto.FLOAT, [1, 1, VOCABULARY]
    )
    return g


def hadamard_factor() -> np.ndarray:
    from resq_compiler.numerics.hadamard_orders import base_matrix

    return base_matrix(48).float().numpy().reshape(-1)


def last_token(g: Graph, x: str) -> str:
    ends = [g.constant(np.array([v], np.int64)) for v in (-1, np.iinfo(np.int64).max, 1)]
    return g.op("Slice", x, ends[0], ends[1], ends[2], domain="")[0]


def float_graph(blocks: int) -> Graph:
    """The same shape in float32."""
    g, rng = Graph(), np.random.default_rng(0)
    x = g.input("x", TensorProto.FLOAT, [1, "S", HIDDEN])
    lengths = [g.input(name, TensorProto.INT32, shape) for name, shape in (("seqlens_k", [1]), ("total", []))]
    gain = g.constant(np.ones(HIDDEN, np.float32))
    tables = [g.constant(np.ones((8192, D // 2), np.float32)) for _ in range(2)]

    def linear(y: str, columns: int, outputs: int) -> str:
        return g.op("MatMul", y, g.constant(rng.standard_normal((columns, outputs), np.float32) * 0.02), domain="")[0]

    def norm(y: str) -> str:
        return g.op("SimplifiedLayerNormalization", y, gain, domain="", epsilon=1e-5, axis=-1)[0]

    for i in range(blocks):
        past = [g.input(f"past{i}{kind}", TensorProto.FLOAT, [1, KV_HEADS, "P", D]) for kind in "kv"]
        qkv = linear(norm(x), HIDDEN, 960)
        y, *present = g.op(
            "GroupQueryAttention", qkv, "", "", *past, *lengths, *tables, outputs=3, domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )  # fmt: skip
        for name in present:
            g.output(name, TensorProto.FLOAT, [1, KV_HEADS, "T", D])
        x = g.op("Add", linear(y, HIDDEN, HIDDEN), x, domain="")[0]
        y = norm(x)
        gate, up = linear(y, HIDDEN, FFN), linear(y, HIDDEN, FFN)
        act = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate, domain="")[0], domain="")[0], up, domain="")[0]
        x = g.op("Add", linear(act, FFN, HIDDEN), x, domain="")[0]
    g.output(linear(norm(last_token(g, x)), HIDDEN, VOCABULARY), TensorProto.FLOAT, [1, 1, VOCABULARY])
    return g


def feeds(session: ort.InferenceSession, tokens: int, past: int) -> dict[str, np.ndarray]:
    """Random inputs of one step of `tokens` tokens behind `past` others."""
    made: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            kind = np.uint8 if "uint8" in value.type else np.float32
            made[value.name] = np.zeros((1, KV_HEADS, past, value.shape[3]), kind)
    given = {
        "x": np.random.default_rng(1).standard_normal((1, tokens, HIDDEN), np.float32),
        "cos": np.ones((1, tokens, D), np.float32), "sin": np.zeros((1, tokens, D), np.float32),
        "mask": np.ones((1, past + tokens), bool), "seqlens_k": np.array([past + tokens - 1], np.int32),
        "total": np.array(past + tokens, np.int32),
    }  # fmt: skip
    return made | {v.name: given[v.name] for v in session.get_inputs() if v.name in given}


def model(blocks: int, threads: int, seconds: float) -> None:
    """Steps of both graphs in turns."""
    sessions = [native_graph(blocks).session(threads, str(library().path)), float_graph(blocks).session(threads, None)]
    print(f"{blocks} blocks and lm_head for the last token, {threads} threads, {library().selected}; ms, best (median)")
    for tokens, past in ((1, 128), (1, 4096), (512, 0)):
        given = [feeds(session, tokens, past) for session in sessions]
        steps = [lambda s=s, f=f: s.run(None, f) for s, f in zip(sessions, given, strict=True)]
        ours, float32 = rounds(steps, seconds)
        shown = [f"{1e3 * min(t):8.2f} ({1e3 * statistics.median(t):.2f})" for t in (ours, float32)]
        ratio = f"{min(float32) / min(ours):.2f} x ({statistics.median(float32) / statistics.median(ours):.2f} x)"
        print(f"{tokens:4} tokens behind {past:4}: native {shown[0]}   float32 {shown[1]}   {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU kernels.")
    parser.add_argument("--blocks", type=int, help="time so many decoder blocks in ONNX Runtime, not linears")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime (default: 2)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring each pair (default: 0.3)")
    arguments = parser.parse_args()
    if arguments.blocks:
        model(arguments.blocks, arguments.threads, arguments.seconds)
    else:
        linears(arguments.seconds)


if __name__ == "__main__":
    main()
