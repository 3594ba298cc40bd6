"""Forms of one computation in ONNX Runtime, side by side: what profile `ort` chose from. SmolLM2-135M's sizes, 30 layers of own weights.

    python benchmarks/onnx_forms.py [--tokens 1 256] [--threads 2] [--rounds 5]

linears:   q/k/v, gate/up, down of 30 layers, 4-bit weights, one scale for each token; milliseconds for all of them
attention: one layer behind a cache of 128 tokens; microseconds
pieces:    what quantizers are made of, one node or chain; microseconds, the node that reads its shape included
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, GROUPS, WIDTH = 30, 9, 3, 64
LINEARS = (("qkv", 576, 960), ("gate_up", 576, 3072), ("down", 1536, 576))
ELEMENTS = {np.dtype(k): v for k, v in (("float32", TensorProto.FLOAT), ("uint8", TensorProto.UINT8))}
MICROSOFT = {"domain": "com.microsoft"}
RANDOM = np.random.default_rng(0)


class Graph:
    """Nodes and initializers of one test graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; the name of its first output."""
        name = f"t{len(self.nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        """An initializer; the first value given for a name stays."""
        self.initializers.setdefault(name, np.asarray(value, dtype))
        return name

    def session(self, feeds: dict[str, np.ndarray], results: list[str], threads: int) -> Any:
        """A session that computes the results and returns only their shapes, so that no output is copied."""
        import onnxruntime

        shapes = [self.op("Shape", name, start=0, end=1) for name in results]
        last = self.op("Concat", *shapes, axis=0)
        inputs = [
            helper.make_tensor_value_info(k, ELEMENTS[v.dtype], [f"{k}_{i}" for i in range(v.ndim)])
            for k, v in feeds.items()
        ]
        weights = [numpy_helper.from_array(v, k) for k, v in self.initializers.items()]
        graph = helper.make_graph(
            self.nodes, "form", inputs, [helper.make_tensor_value_info(last, TensorProto.INT64, None)], weights
        )
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        model = helper.make_model(graph, opset_imports=imports, ir_version=11).SerializeToString()
        keep_equal_nodes = ["CommonSubexpressionElimination"]
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=keep_equal_nodes
        )


def codes(tokens: int, width: int) -> np.ndarray:
    return RANDOM.integers(240, 256, (1, tokens, width)).astype(np.uint8)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def product(graph: Graph, form: str, name: str, width: int, out: int) -> str:
    """One linear of quantized tokens u (or float tokens x) with scales s."""
    if form == "float32 MatMul":
        return graph.op("MatMul", f"x{width}", graph.constant(name, normal(width, out)))
    if form.startswith("MatMulNBits"):
        block, level = (int(n) for n in form.split()[1:])
        count = -(-width // block)
        packed = graph.constant(name, RANDOM.integers(0, 255, (out, count, block // 2)).astype(np.uint8))
        scales = graph.constant(f"scales{out}_{count}", np.full(out * count, 0.01, np.float32))
        return graph.op(
            "MatMulNBits",
            f"x{width}",
            packed,
            scales,
            K=width,
            N=out,
            bits=4,
            block_size=block,
            accuracy_level=level,
            **MICROSOFT,
        )
    weight, scales = (
        graph.constant(name, RANDOM.integers(-8, 8, (width, out)).astype(np.int8)),
        graph.constant(f"s{out}", normal(out)),
    )
    zero = graph.constant("zero", np.uint8(240))
    if form == "fused, scale of rows inside":
        return graph.op("MatMulIntegerToFloat", f"u{width}", weight, "s", scales, zero, **MICROSOFT)
    if form == "fused, Mul by scale of rows":
        one = graph.constant("one", np.float32(1))
        return graph.op(
            "Mul", graph.op("MatMulIntegerToFloat", f"u{width}", weight, one, scales, zero, **MICROSOFT), "s"
        )
    total = graph.op("Cast", graph.op("MatMulInteger", f"u{width}", weight, zero), to=TensorProto.FLOAT)
    return graph.op("Mul", graph.op("Mul", total, scales), "s")


LINEAR_FORMS = ("float32 MatMul", "MatMulInteger, Cast, Mul, Mul", "fused, scale of rows inside", "fused, Mul by scale of rows",
                "MatMulNBits 32 4", "MatMulNBits 128 4", "MatMulNBits 128 1")  # fmt: skip


def linears(form: str, feeds: dict[str, np.ndarray], threads: int) -> Any:
    """All linears of all layers in one form."""
    graph = Graph()
    results = [product(graph, form, f"{name}{i}", width, out) for i in range(LAYERS) for name, width, out in LINEARS]
    used = {name for node in graph.nodes for name in node.input}
    return graph.session({k: v for k, v in feeds.items() if k in used}, results, threads)


def attention(form: str, graph: Graph, total: int) -> str:
    """One layer of attention from q, k, v, a mask and a cache."""
    sizes = {"scale": 0.125}
    if form == "Attention":
        return graph.op(
            "Attention", "q", "k", "v", "mask", "pk", "pv", outputs=3, q_num_heads=HEADS, kv_num_heads=GROUPS, **sizes
        )
    if form == "GroupQueryAttention":
        ends = graph.constant("last", np.array([total - 1], np.int32)), graph.constant("total", np.int32(total))
        return graph.op(
            "GroupQueryAttention",
            "q",
            "k",
            "v",
            "pk",
            "pv",
            *ends,
            outputs=3,
            num_heads=HEADS,
            kv_num_heads=GROUPS,
            **sizes,
            **MICROSOFT,
        )

    def appended(past: str, new: str) -> str:
        split = graph.op("Reshape", new, graph.constant("kv", [0, 0, GROUPS, WIDTH]))
        return graph.op("Concat", past, graph.op("Transpose", split, perm=[0, 2, 1, 3]), axis=2)

    keys, values = appended("pk", "k"), appended("pv", "v")
    queries = graph.op(
        "Transpose", graph.op("Reshape", "q", graph.constant("heads", [0, 0, HEADS, WIDTH])), perm=[0, 2, 1, 3]
    )
    folded = graph.op("Reshape", queries, graph.constant("fold", [0, GROUPS, -1, WIDTH]))
    scores = graph.op("MatMul", folded, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    return graph.op("MatMul", graph.op("Softmax", graph.op("Add", scores, "mask3"), axis=-1), values)


def pieces(tokens: int) -> dict[str, tuple[dict[str, np.ndarray], Callable[[Graph], str]]]:
    """Name -> (inputs, maker)."""
    x, s, z = normal(1, tokens, 576), np.abs(normal(1, tokens, 1)) + 0.5, np.full((1, tokens, 1), 247, np.uint8)
    u = codes(tokens, 576)

    def clip(g: Graph) -> str:
        return g.op("Clip", "s", "", g.constant("c", np.float32(0)))

    def split(g: Graph) -> str:
        return g.op("Split", "x", g.constant("c", [504, 72]), axis=-1, outputs=2)

    def pad(g: Graph) -> str:
        return g.op("Pad", "x", g.constant("p", [0, 0, 3, 0, 0, -72]), g.constant("c", np.float32(0)))

    def arithmetic(g: Graph) -> str:
        both = (g.op("Cast", name, to=TensorProto.FLOAT) for name in ("u", "z"))
        return g.op("Mul", g.op("Sub", *both), "s")

    def quantize(g: Graph) -> str:
        return g.op("QuantizeLinear", "x", "s", "z", axis=-1, block_size=576)

    def dequantize(g: Graph) -> str:
        return g.op("DequantizeLinear", "u", "s", "z", axis=-1, block_size=576)

    def rounded(g: Graph) -> str:
        return g.op("Mul", g.op("Round", g.op("Div", "x", "s")), "s")

    return {
        "max(s, 0): Max": ({"s": s}, lambda g: g.op("Max", "s", g.constant("c", np.float32(0)))),
        "max(s, 0): Clip": ({"s": s}, clip),
        "576 -> 504 | 72: Split": ({"x": x}, split),
        "576 -> zeros | 504: Pad": ({"x": x}, pad),
        "QuantizeLinear, blocks of a row": ({"x": x, "s": s, "z": z}, quantize),
        "image: DequantizeLinear": ({"u": u, "s": s, "z": z}, dequantize),
        "image: Cast, Cast, Sub, Mul": ({"u": u, "s": s, "z": z}, arithmetic),
        "image of x: Div, Round, Mul": ({"x": x, "s": s}, rounded),
    }


def seconds(session: Any, feeds: dict[str, np.ndarray], repeats: int) -> float:
    """Of one run, the mean of several in a row."""
    import onnxruntime

    wanted = {i.name for i in session.get_inputs()}
    values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items() if k in wanted}
    outputs = [o.name for o in session.get_outputs()]
    session.run_with_ort_values(outputs, values)
    began = time.perf_counter()
    for _ in range(repeats):
        session.run_with_ort_values(outputs, values)
    return (time.perf_counter() - began) / repeats


def compare(
    title: str, unit: float, made: dict[str, tuple[Any, dict[str, np.ndarray]]], rounds: int, repeats: int
) -> None:
    """Median of every form over interleaved rounds, in units of `unit` seconds."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, (session, feeds) in made.items():
            times[name].append(seconds(session, feeds, repeats))
    print(title)
    for name, values in times.items():
        print(f"  {name:34s} {statistics.median(values) / unit:9.2f}  (best {min(values) / unit:.2f})", flush=True)


def measure(tokens: int, threads: int, rounds: int) -> None:
    """All comparisons at one number of tokens."""
    repeats = 10 if tokens == 1 else 2
    feeds = {"s": np.abs(normal(1, tokens, 1))}
    feeds |= {f"x{n}": normal(1, tokens, n) for n in (576, 1536)} | {f"u{n}": codes(tokens, n) for n in (576, 1536)}
    compare(
        f"linears, {tokens} tokens, ms",
        1e-3,
        {f: (linears(f, feeds, threads), feeds) for f in LINEAR_FORMS},
        rounds,
        repeats,
    )
    total = tokens + 128
    mask = np.where(np.tril(np.ones((tokens, total), bool), 128), 0, -1e9).astype(np.float32)[None, None]
    cache = {name: normal(1, GROUPS, 128, WIDTH) for name in ("pk", "pv")}
    inputs = {"q": normal(1, tokens, 576), "k": normal(1, tokens, 192), "v": normal(1, tokens, 192), "mask": mask,
              "mask3": np.concatenate([mask] * 3, 2), **cache}  # fmt: skip
    made = {}
    for form in ("Attention", "GroupQueryAttention", "MatMul, Add, Softmax, MatMul"):
        graph = Graph()
        results = [attention(form, graph, total) for _ in range(10)]
        used = {name for node in graph.nodes for name in node.input}
        made[form] = graph.session({k: v for k, v in inputs.items() if k in used}, results, threads), inputs
    compare(f"attention, {tokens} tokens behind 128, us", 1e-5, made, rounds, repeats)
    small = {}
    for name, (values, maker) in pieces(tokens).items():
        graph = Graph()
        small[name] = graph.session(values, [maker(graph) for _ in range(40)], threads), values
    compare(f"pieces, {tokens} tokens, us", 4e-5, small, rounds, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        measure(tokens, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
