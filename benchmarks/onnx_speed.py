"""Speed, memory and size of ONNX exports on a CPU, side by side in one process: ours, ONNX Runtime float32, PyTorch, genai.

    python benchmarks/onnx_speed.py COMPILED_DIR FLOAT_MODEL [--genai DIR ...] [--rounds 7] [--profile]

COMPILED_DIR: from `resq compile`, FLOAT_MODEL: what it was made from (or `embedded`). Every round measures every row once, so load on the
machine hits all rows alike; medians over rounds, and the ratio to ONNX Runtime float32, which the same emitter exports from the
float graph, with the same fused operators and session options. --genai: directories of onnxruntime-genai's own builder.
--profile: where the time goes, by kind of operator, for prefill and decode, and a lower bound: what would be left if quantizers, sums,
scales and splits took no time at all, beside half the time of float32 in the same run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes, export  # noqa: F401  (emitters register)
from resq_compiler.backends.onnx import session as sessions
from resq_compiler.backends.onnx.draft import Draft
from resq_compiler.backends.onnx.export import draft_model
from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.forms import Form
from resq_compiler.backends.onnx.lowering import Lowering, LoweringOptions
from resq_compiler.backends.onnx.profiles import FLUSH_DENORMALS, PREFILL_CHUNK

from resq_compiler import api, load
from resq_compiler.cli.commands.common import model_source
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.frontend.models import load_model, open_model

VOCABULARY_SEED = 0
CHUNKED = f", chunks of {PREFILL_CHUNK}"  # how resq_compiler's runtime and genai_config.json run a prompt
Step = Callable[[], None]


def token_ids(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(VOCABULARY_SEED).integers(0, vocabulary, (1, count)).astype(np.int64)


class OrtModel:
    """One exported model: prefill of `prompt` tokens and decode steps behind them, logits of all new tokens computed."""

    def __init__(self, path: Path, prompt: int, vocabulary: int, chunk: int = 0):
        self.session = sessions.open_session(path)
        self.prompt, self.chunk = prompt, chunk or prompt
        self.ids = token_ids(prompt, vocabulary)
        self.past: dict[str, Any] = {}
        self.prefill()

    def _empty(self) -> dict[str, Any]:
        import onnxruntime

        kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        entries = [i for i in self.session.get_inputs() if i.name.startswith("past")]
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        return {i.name: make(np.zeros([1, i.shape[1], 0, i.shape[3]], kinds[i.type])) for i in entries}

    def _run(self, ids: np.ndarray, past: dict[str, Any], length: int) -> dict[str, Any]:
        import onnxruntime

        make = onnxruntime.OrtValue.ortvalue_from_numpy
        new = ids.shape[1]
        values = {"input_ids": ids, "attention_mask": np.ones((1, length + new), np.int64),
                  "position_ids": np.arange(length, length + new)[None].astype(np.int64)}  # fmt: skip
        outputs = sessions.run(self.session, {**{k: make(v) for k, v in values.items()}, **past})
        del outputs["logits"]
        return {k.replace("present.", "past_key_values."): v for k, v in outputs.items()}

    def prefill(self) -> None:
        past = self._empty()
        for start in range(0, self.prompt, self.chunk):
            past = self._run(self.ids[:, start : start + self.chunk], past, start)
        self.past = past

    def decode(self, steps: int) -> None:
        past = self.past
        for i in range(steps):
            past = self._run(self.ids[:, :1], past, self.prompt + i)


class TorchModel:
    """The float model in PyTorch, eager, with its own cache."""

    def __init__(self, model: Any, prompt: int, vocabulary: int):
        self.model, self.ids = model, torch.from_numpy(token_ids(prompt, vocabulary))
        self.cache: Any = None
        self.prefill()

    @torch.no_grad()
    def prefill(self) -> None:
        self.cache = self.model(self.ids, use_cache=True).past_key_values

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.model(self.ids[:, :1], past_key_values=self.cache, use_cache=True)
        self.cache.crop(-steps)


class GenaiModel:
    """A directory in onnxruntime-genai."""

    def __init__(self, path: str, prompt: int, vocabulary: int):
        import onnxruntime_genai as genai

        self.genai, self.model = genai, genai.Model(path)
        self.ids = token_ids(prompt, vocabulary)[0].astype(np.int32)
        self.generator: Any = None
        self.prefill()

    def prefill(self) -> None:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(self.ids) + 512, do_sample=False)
        self.generator = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(self.ids)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.generator.generate_next_token()


def float_draft(source: str, form: Form) -> Draft:
    """The float graph with the emitters and operators of a profile; its weights are read when they are written."""
    graph, context = api.trace(open_model(source))
    entries = context.example_inputs[3:]
    cache = tuple(
        CacheSpec(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(entries[::2], entries[1::2], strict=True)
    )
    metadata = {"resq.session_options": json.dumps(FLUSH_DENORMALS)}
    return Lowering(graph, cache, form, LoweringOptions("float32")).run().draft("float32", metadata, export.version())


def float_model(source: str, directory: Path) -> Path:
    """Export the float graph as ONNX Runtime runs it fastest: as in the `ort` profile."""
    directory.mkdir()
    export.save_model(float_draft(source, IntegerForm()), directory)
    return directory / export.MODEL_FILE


def rows(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """Name and maker (of the prompt length) of every row."""
    compiled = load(Path(arguments.compiled))
    vocabulary = compiled.config.get_text_config().vocab_size
    path = float_model(arguments.float_model, work / "float32")
    yield "ONNX Runtime float32", lambda n: OrtModel(path, n, vocabulary)
    yield f"ONNX Runtime float32{CHUNKED}", lambda n: OrtModel(path, n, vocabulary, PREFILL_CHUNK)
    for profile in arguments.profiles:
        target = work / profile
        target.mkdir()
        export.save_model(draft_model(compiled, profile), target)
        file = target / export.MODEL_FILE
        print(f"{profile}: {sum(p.stat().st_size for p in target.iterdir()) / 2**20:.1f} MiB on disk")
        yield f"ours {profile}", lambda n, file=file: OrtModel(file, n, vocabulary)
        if profile == "ort":
            yield f"ours ort{CHUNKED}", lambda n, file=file: OrtModel(file, n, vocabulary, PREFILL_CHUNK)
    for dtype in () if arguments.no_torch else (torch.float32, torch.bfloat16):
        model = load_model(arguments.float_model).model.to(dtype)
        yield f"PyTorch {str(dtype).removeprefix('torch.')}", lambda n, model=model: TorchModel(model, n, vocabulary)
    for directory in arguments.genai:
        yield f"genai {Path(directory).name}", lambda n, directory=directory: GenaiModel(directory, n, vocabulary)


def measure(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare(arguments: argparse.Namespace, made: list[tuple[str, Callable[[int], Any]]]) -> dict[str, float]:
    """Both phases of every row, interleaved. Returns the milliseconds of the first row, by phase."""
    prefill = {name: make(arguments.prompt) for name, make in made}
    decode = {name: make(arguments.context) for name, make in made}
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for _ in range(arguments.rounds):
        for name, _ in made:
            times[name, "prefill"].append(measure(prefill[name].prefill) / arguments.prompt)
            decode[name].prefill()
            decode[name].decode(2)
            times[name, "decode"].append(measure(lambda: decode[name].decode(arguments.steps)) / arguments.steps)  # noqa: B023
    base = made[0][0]
    phases = f"prefill of {arguments.prompt}", f"decode behind {arguments.context}"
    print(f"{'tokens per second, median (best)':34s} {phases[0]:>28s} {phases[1]:>30s}")
    for name, _ in made:
        cells = []
        for phase in ("prefill", "decode"):
            median, best = statistics.median(times[name, phase]), min(times[name, phase])
            ratio = statistics.median(times[base, phase]) / median
            best_ratio = min(times[base, phase]) / best
            cells.append(f"{1 / median:8.1f} ({1 / best:7.1f}) x{ratio:4.2f} (x{best_ratio:4.2f})")
        print(f"{name:34s} " + "  ".join(cells), flush=True)
    sizes = {"prefill": arguments.prompt, "decode": 1}
    return {phase: 1e3 * statistics.median(times[base, phase]) * size for phase, size in sizes.items()}


REMOVABLE = ("quantize and dequantize", "sums, scales, splits")
CATEGORIES = {
    "integer products": ("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"),
    "attention and cache": ("Attention", "Softmax", "GroupQueryAttention"),
    "norms": ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "rotary embedding": ("RotaryEmbedding",),
    "activation": ("QuickGelu", "Gelu"),
}


def category(event: dict[str, Any]) -> str:
    """What a profiled node belongs to, by its name (the FX node it came from) and operator."""
    scope, operator = event["name"].split("/")[0], event["args"]["op_name"]
    for name, operators in CATEGORIES.items():
        if operator in operators:
            shapes = str(event["args"].get("output_type_shape", ""))
            return "lm_head" if name == "integer products" and "49152" in shapes else name
    for prefix, name in (
        ("hadamard", "Hadamard"),
        ("quantize", "quantize and dequantize"),
        ("image", "quantize and dequantize"),
        ("project", "U_C"),
        ("embedding", "embedding"),
    ):
        if scope.startswith(prefix):
            return name
    return "float products" if "MatMul" in operator else "sums, scales, splits"


def profile_phases(path: Path, prompt: int, context: int, vocabulary: int, float_ms: dict[str, float]) -> None:
    """Time by category, the fastest of several runs of every node. float_ms: of float32, by phase."""
    import onnxruntime

    for label, new, past in (("prefill", prompt, 0), ("decode", 1, context)):
        options = sessions.session_options(sessions.recommended_options(sessions.metadata(str(path))), None)
        options.enable_profiling = True
        options.profile_file_prefix = str(path.parent / label)
        model = OrtModel.__new__(OrtModel)
        model.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        ids = token_ids(new, vocabulary)
        before = model._run(token_ids(past, vocabulary), model._empty(), 0) if past else model._empty()
        for _ in range(8 if new > 1 else 40):
            model._run(ids, before, past)
        events = json.loads(Path(model.session.end_profiling()).read_text())
        report(label, events, new, float_ms[label])


def report(label: str, events: list[dict[str, Any]], new: int, float_ms: float) -> None:
    """Print the table of one phase, and its lower bound without the profiler's share, taken as the time of the cheapest node."""
    best: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            if f"[1, {new}," not in str(event["args"].get("output_type_shape", "")) and new > 1:
                continue
            key = (category(event), event["name"])
            best[key] = min(best.get(key, float("inf")), event["dur"])
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for (name, _), duration in best.items():
        totals[name] += duration
        counts[name] += 1
    everything = sum(totals.values())
    print(f"\n{label}: {everything / 1e3:.1f} ms in {sum(counts.values())} nodes")
    for name, duration in totals.most_common():
        print(f"  {name:26s} {duration / 1e3:8.2f} ms {100 * duration / everything:5.1f} %  {counts[name]:5d} nodes")
    cheapest = min(best.values())
    least = sum(duration - cheapest * counts[name] for name, duration in totals.items() if name not in REMOVABLE)
    print(
        f"  lower bound, were {' and '.join(REMOVABLE)} free: {least / 1e3:.1f} ms; half of float32: {float_ms / 2:.1f} ms"
    )


MEMORY_PROBE = """
import ctypes, sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = onnxruntime.InferenceSession(sys.argv[1], options)
new, past = int(sys.argv[2]), int(sys.argv[3])
feeds = {"input_ids": np.zeros((1, new), np.int64), "attention_mask": np.ones((1, past + new), np.int64),
         "position_ids": np.arange(past, past + new)[None]}
for entry in session.get_inputs()[3:]:
    kind = np.uint8 if "uint8" in entry.type else np.float32
    feeds[entry.name] = np.ones((1, entry.shape[1], past, entry.shape[3]), kind)
cache = sum(v.nbytes for name, v in feeds.items() if name.startswith("past"))
session.run(None, feeds)
resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
plain = resident()
ctypes.CDLL(None).malloc_trim(0)
print(plain, resident(), cache)
"""


def memory(path: Path, new: int = 64, past: int = 0) -> tuple[float, float, float]:
    """MiB of a process that imported nothing but onnxruntime, loaded the model and ran `new` tokens: resident, resident once the free
    heap was given back (as resq_compiler's runtime does), and cache tensors of `past` tokens."""
    command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(new), str(past)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain, trimmed, cache = map(int, done.stdout.split())
    return plain / 1024, trimmed / 1024, cache / 2**20


def report_memory(work: Path, profiles: list[str]) -> None:
    """Resident memory of every profile."""
    for name in ("float32", *profiles):
        plain, trimmed, _ = memory(work / name / export.MODEL_FILE)
        print(f"resident memory, {name}: {plain:.0f} MiB, {trimmed:.0f} with the free heap given back", flush=True)


def report_cache(compiled: str, work: Path, tokens: int) -> None:
    """Cache tensors and resident memory behind a long context, float and packed."""
    (work / "packed").mkdir()
    export.save_model(draft_model(load(Path(compiled)), "ort", kv_cache="packed"), work / "packed")
    for name in ("ort", "packed"):
        _, trimmed, cache = memory(work / name / export.MODEL_FILE, 1, tokens)
        print(
            f"cache of {tokens} tokens, {name}: {cache:.1f} MiB of tensors, {trimmed:.0f} MiB resident after one step",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compiled")
    parser.add_argument("float_model")
    parser.add_argument("--profiles", nargs="+", default=["ort"])
    parser.add_argument("--genai", nargs="*", default=[])
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--long-context", type=int, default=0, help="tokens of cache whose memory is measured, float and packed"
    )
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    arguments.float_model = model_source(arguments.float_model)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory(prefix="onnx-speed-") as directory:
        work = Path(directory)
        made = list(rows(arguments, work))
        float_ms = compare(arguments, made)
        report_memory(work, arguments.profiles)
        if arguments.long_context and "ort" in arguments.profiles:
            report_cache(arguments.compiled, work, arguments.long_context)
        if arguments.profile:
            profile_phases(work / "ort" / export.MODEL_FILE, arguments.prompt, arguments.context, 1000, float_ms)


if __name__ == "__main__":
    main()
