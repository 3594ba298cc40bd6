"""What needs a GPU, in one run of at most 8 minutes: tests marked gpu, the Triton kernels, a compile, decoding with a CUDA graph.

    make gpu PYTHON=python3.12                          writes out/gpu/gpu.json and out/gpu/gpu.md
    python benchmarks/gpu.py --output DIR --only kernels

Every step is a process of its own with a time limit: one that fails, or takes too long, is told in the report, and the others run. Needs no
network and no packages beside torch with CUDA, triton, transformers and pytest. What this PyTorch or transformers is too old for skips with
the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"tests": 150, "kernels": 50, "decode": 170, "compile": 100}  # seconds; 470 with all
MARK = "mark.gpu"
KERNELS = ("norm_quantize", "mixed_linear", "grouped_linear", "hadamard_quantize", "attention", "backend")
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
FOUR_BLOCKS = {**LLAMA_1B, "num_hidden_layers": 4}  # all 16 took longer than there is time for
WINDOWS, LENGTH = 16, 512
PROMPT, NEW = 128, 64


def run_tests() -> dict[str, Any]:
    """Every test marked gpu, and those of the kernels with every launch on the GPU: how each ended, and why it was skipped."""
    marked = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in f.read_text()]
    kernels = [ROOT / "tests" / "backends" / "triton" / f"test_{name}.py" for name in KERNELS]
    tests: dict[str, str] = {}
    for files, expression in ((marked, "gpu"), (kernels, "not slow and not gpu")):
        found = run_pytest(files, expression)
        if isinstance(found, str):
            return {"tests": tests, "error": found}
        tests |= found
    return {"tests": tests}


def run_pytest(files: list[Path], expression: str) -> dict[str, str] | str:
    """How each test of these files that the expression selects ended, or the end of what pytest said."""
    report = ROOT / "gpu-tests.xml"
    report.unlink(missing_ok=True)
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", expression, "-p", "no:cacheprovider", f"--junitxml={report}",
        *workers, *(str(f.relative_to(ROOT)) for f in files),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return read_junit(report) if report.is_file() else (done.stdout + done.stderr)[-2000:]


def read_junit(report: Path) -> dict[str, str]:
    """How each test ended: "passed", or what pytest says of a failure or a skip."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [end for end in case if end.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = f"{ends[0].tag}: {str(ends[0].get('message'))[:300]}" if ends else "passed"
    return found


def measure_kernels() -> dict[str, Any]:
    """Blocks of Llama-3-8B's and SmolLM2's shapes on the kernels and in float16 PyTorch, in milliseconds."""
    import triton_kernels
    from resq_compiler.backends.triton import shapes

    blocks = []
    for shape in (shapes.LLAMA3_8B, shapes.SMOLLM2_135M):
        for tokens, total in ((2048, 2048), (1, 2048)):
            found = triton_kernels.measure(shape, tokens, total, tune=False)
            blocks.append({"shape": shape.name, "tokens": tokens, "cached": total, **found})
    return {"blocks": blocks}


def random_model(config: dict[str, Any], device: str) -> Any:
    """A Llama with random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32).eval()


def compiled_on(model: Any, device: str, windows: int, length: int, **options: Any) -> Any:
    """The model by `resq`, calibrated on random tokens; a line for each pass, so that one that is ended says how far it was."""
    import torch

    import resq_compiler

    ids = torch.randint(0, model.config.vocab_size, (windows, length))
    began = time.perf_counter()

    def tell(stage: Any) -> None:
        at = time.perf_counter() - began
        print(f"{at:.1f} s: {stage.name} took {stage.seconds:.1f} s", file=sys.stderr, flush=True)

    return resq_compiler.compile(
        model, ids, recipe="resq", device=device, calibration_samples=windows, calibration_length=length, basis_samples=windows,
        on_stage=tell, **options,
    )  # fmt: skip


def measure_compile(
    config: dict[str, Any] = FOUR_BLOCKS, device: str = "cuda", windows: int = WINDOWS, length: int = LENGTH
) -> dict[str, Any]:
    """A random model compiled on the device."""
    import torch

    model = random_model(config, device).cpu()
    began = time.perf_counter()
    compiled = compiled_on(model, device, windows, length)
    result: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    result["stage_seconds"] = {f"{s.index:02d} {s.name}": round(s.seconds, 2) for s in compiled.stages}
    result["resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        result["device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def measure_decoding(config: dict[str, Any] = LLAMA_1B, device: str = "cuda") -> dict[str, Any]:
    """A random model, rounded to nearest, decoding: float16 PyTorch, the Triton backend, the same as a CUDA graph."""
    import torch

    model = random_model(config, device)
    prompt = torch.randint(0, config["vocab_size"], (1, PROMPT)).to(device)
    result: dict[str, Any] = {"float16_tokens_per_second": float_decoding(model, prompt)}
    compiled = compiled_on(
        model.float().cpu(), device, 1, PROMPT, weight_method="rtn", weight_clip="max", lm_head_bits=8
    )
    del model
    compiled.to(device).use_backend("triton", dtype=torch.float16 if device == "cuda" else torch.float32)
    return result | graph_decoding(compiled, prompt)


def float_decoding(model: Any, prompt: Any) -> float:
    """Tokens a second of greedy decoding in float16, as transformers does it."""
    import torch

    half = model.half() if prompt.is_cuda else model
    with torch.no_grad():
        half.generate(prompt, max_new_tokens=4, do_sample=False)
        return NEW / seconds_of(
            lambda: half.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False), prompt.is_cuda
        )


def graph_decoding(compiled: Any, prompt: Any) -> dict[str, Any]:
    """Tokens a second of a StaticDecoder, step by step and, on a GPU, as a CUDA graph; whether both give the same tokens."""
    from resq_compiler.backends.triton.decode import StaticDecoder

    result: dict[str, Any] = {}
    tokens = {}
    for kind in ("steps", "graph") if prompt.is_cuda else ("steps",):
        decoder = StaticDecoder(compiled, prompt, new_tokens=NEW + 4)
        if kind == "graph":
            decoder.capture()
        first = decoder.generate(4)
        kept: list[Any] = []
        result[f"triton_{kind}_tokens_per_second"] = NEW / seconds_of(
            lambda d=decoder, k=kept: k.append(d.generate(NEW)), prompt.is_cuda
        )
        tokens[kind] = first.tolist()[0] + kept[0].tolist()[0]
    return result | {"same_tokens": len({tuple(t) for t in tokens.values()}) == 1}


def seconds_of(call: Callable[[], Any], on_gpu: bool) -> float:
    """Wall time of a call, the device's work included."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "tests": run_tests, "kernels": measure_kernels, "decode": measure_decoding, "compile": measure_compile,
}  # fmt: skip


def run_step(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """The JSON that a step's process ends its output with, or why there is none; its seconds."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        last = done.stdout.strip().rpartition("\n")[2]
        result = json.loads(last) if done.returncode == 0 else {"error": (done.stderr or done.stdout).strip()[-2000:]}
    except subprocess.TimeoutExpired as expired:
        said = (expired.stderr or b"").decode(errors="replace").strip()[-2000:]
        result = {"error": f"{said}\ntook longer than {limit:g} s".strip()}
    except ValueError as error:
        result = {"error": f"its output is no JSON: {error}"}
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def machine() -> dict[str, str]:
    """What it ran on."""
    import torch
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"date": time.strftime("%Y-%m-%d"), "gpu": gpu, "python": platform.python_version(), **versions}


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    where = report["machine"]
    lines = [
        f"Measured {where['date']} on {where['gpu']}, "
        + ", ".join(f"{k} {v}" for k, v in where.items() if k not in ("date", "gpu")),
        "",
    ]
    for name in (name for name in STEPS if "error" in report.get(name, {})):
        lines += [f"{name}: failed: {report[name]['error'].splitlines()[-1]}", ""]
    if tests := report.get("tests", {}).get("tests"):
        lines += [*tests_table(tests), ""]
    if blocks := report.get("kernels", {}).get("blocks"):
        lines += ["| block | new | cached | us | float16 us | times float16 |", "|---|--:|--:|--:|--:|--:|"]
        for b in blocks:
            ours, half = b["block"] * 1e3, b["float16"] * 1e3
            lines.append(
                f"| {b['shape']} | {b['tokens']} | {b['cached']} | {ours:.1f} | {half:.1f} | {half / ours:.2f} |"
            )
        lines.append("")
    found = report.get("decode", {}) | report.get("compile", {})
    compiled = {k: v for k, v in found.items() if k not in ("error", "seconds", "stage_seconds")}
    if compiled:
        lines += ["| Llama-3.2-1B's shape: decoding, and a compile of four blocks | |", "|---|--:|"]
        lines += [
            f"| {k.replace('_', ' ')} | {v:,.1f} |" if isinstance(v, float) else f"| {k.replace('_', ' ')} | {v} |"
            for k, v in compiled.items()
        ]
    return "\n".join(lines).rstrip() + "\n"


def tests_table(tests: dict[str, str]) -> list[str]:
    """Passed, failed and skipped tests of each file, then those that failed."""
    ends = ("passed", "failed", "skipped")
    counts: dict[str, dict[str, int]] = {}
    failed = []
    for name, end in tests.items():
        kind = end if end == "passed" else "skipped" if end.startswith("skipped") else "failed"
        if kind == "failed":
            failed.append(f"| {name} | {end} |")
        counts.setdefault(name.partition("::")[0], dict.fromkeys(ends, 0))[kind] += 1
    lines = ["| tests | passed | failed | skipped |", "|---|--:|--:|--:|"]
    lines += [f"| {file} | {' | '.join(str(c[kind]) for kind in ends)} |" for file, c in counts.items()]
    return [*lines, "", "| failed | |", "|---|---|", *failed] if failed else lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description="tests and measurements that need a GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("out/gpu"), help="where gpu.json and gpu.md go (default: out/gpu)"
    )
    parser.add_argument("--only", choices=STEPS, action="append", help="these steps only")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        print("\n" + json.dumps(STEPS[options.step]()))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no CUDA or ROCm device here; run this on a machine with a GPU",
            file=sys.stderr,
        )
        return 2
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    report: dict[str, Any] = {"machine": machine()}
    for name in options.only or STEPS:
        print(f"{name} (at most {LIMITS[name]} s) ...", file=sys.stderr, flush=True)
        report[name] = run_step(name, [sys.executable, __file__, "--step", name], LIMITS[name])
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.output / "gpu.md").write_text(markdown(report))
    print(markdown(report))
    failed = [e for e in report.get("tests", {}).get("tests", {}).values() if e.startswith(("failure", "error"))]
    return 1 if failed or any("error" in report[name] for name in options.only or STEPS) else 0


if __name__ == "__main__":
    sys.exit(main())
