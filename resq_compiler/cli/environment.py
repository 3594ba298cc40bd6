"""What this machine has: versions, CPU, backends. For bug reports, and for the records beside compiled models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from resq_compiler import __version__
from resq_compiler.errors import BackendError

LIBRARIES = ("torch", "transformers", "safetensors", "networkx", "numpy", "onnx", "onnxruntime", "triton", "gguf", "accelerate",
             "datasets", "lm_eval")  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "TRITON_INTERPRET", "RESQ_DUMP_DIR")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries it uses; absent ones are left out."""
    found = {"resq_compiler": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """Model name, cores this process may use, and the instruction sets that matter to integer products."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "features": [flag for flag in CPU_FLAGS if flag in flags],
    }


def backends() -> dict[str, str]:
    """For every backend "available", or why it is not."""
    from resq_compiler.backends import BACKENDS, load_backend

    found = {}
    for name in BACKENDS:
        try:
            load_backend(name)
            found[name] = "available"
        except (BackendError, ImportError) as error:
            found[name] = (
                f"not available: {str(error).removeprefix(f'backend {name}: ').partition('; use backend=')[0]}"
            )
    return found


def environment() -> dict[str, Any]:
    """All of the above with threads and settings, as plain values."""
    import torch

    from resq_compiler.backends.cpu.library import description

    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": backends(),
        "cpu_kernels": description(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def peak_memory() -> int | None:
    """Most memory this process ever held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_average() -> float | None:
    """Processes that wanted a core over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
