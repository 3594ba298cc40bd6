"""Ahead-of-time compilation of recorded launches for GPUs that are not here, and what the machine code says.

    python -m resq_compiler.backends.triton.aot [--target sm_86] [--case NAME] [--dtype float32] [--list]     -> one JSON line a kernel

Must run in a process without TRITON_INTERPRET=1: Triton decides at import whether a kernel is interpreted or compiled.
A case is a call of a wrapper on meta tensors (`AOT_SIGNATURES` beside each kernel), so what is compiled here, constants, tile
sizes and pointer alignments included, is what the wrapper would launch on that GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from resq_compiler.backends.triton.gpus import GPUS, Gpu
from resq_compiler.backends.triton.launch import Launch, interpreted, recording
from resq_compiler.backends.triton.shapes import floats_of

from resq_compiler.errors import BackendError

KERNEL_MODULES = ("norm_quantize", "mixed_linear", "grouped_linear", "hadamard_quantize", "rope_cache", "attention")
FLOATS = {"float16": torch.float16, "float32": torch.float32}
MATRIX_OPCODES = (r"(mma\.sync\S+|wgmma\.mma_async\S+|tcgen05\.mma\S+)", r"(v_mfma_\w+)")
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler produced for one launch on one target.

    registers: of a thread.    spills: bytes of local memory a thread uses.    shared: bytes of a program.
    matrix: matrix instructions of the assembly and how often they occur.    wide_loads: global loads of 128 bits.
    occupancy: resident warps over the most the processor holds, from registers and shared memory.
    """

    case: str
    target: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    matrix: dict[str, int]
    wide_loads: int
    instructions: int


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every named case of every kernel: ("mixed_linear/decode_qkv", call)."""
    for module in KERNEL_MODULES:
        loaded = importlib.import_module(f"resq_compiler.backends.triton.{module}")
        for name, call in loaded.AOT_SIGNATURES.items():
            yield f"{module}/{name}", call


def compile_case(name: str, call: Callable[[], object], target: Gpu) -> list[CompiledKernel]:
    """Compile the launches that `call` makes on `target`.

    Raises: BackendError: this process interprets kernels, so it cannot compile them.
    """
    if interpreted():
        raise BackendError("aot: this process has TRITON_INTERPRET=1; compile in a process started without it")
    with recording(target) as recorder:
        call()
    return [compile_launch(name, launch, target) for launch in recorder.launches]


def compile_launch(case: str, launch: Launch, target: Gpu) -> CompiledKernel:
    """Compile one recorded launch and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = _specialize(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spills, instructions = read(compiled.asm)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    matrix = Counter(m for pattern in MATRIX_OPCODES for m in re.findall(pattern, text))
    wide = r"cp\.async\S+ \[[^\n]*0x10|ld\.global\S*v4\.(?:b32|u32)|global_load_(?:lds_)?dwordx4|buffer_load_dwordx4"
    shared, warps = compiled.metadata.shared, options["num_warps"]
    return CompiledKernel(
        case, target.name, launch.kernel.__name__, launch.grid, warps, registers, spills, shared,
        occupancy(target, warps, registers, shared), dict(matrix), len(re.findall(wide, text)), instructions,
    )  # fmt: skip


def occupancy(target: Gpu, warps: int, registers: int, shared: int) -> float:
    """Resident warps of a processor over its maximum, for programs of `warps` warps; 0 when one program does not fit."""
    of_warp = -(-registers * target.warp_size // 256) * 256
    by_registers = target.registers // max(1, of_warp * warps)
    by_shared = target.shared_processor // (shared + 1024) if shared else target.warps
    return min(by_registers, by_shared, target.warps // warps) * warps / target.warps


def _specialize(launch: Launch) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, options) as Triton's own launcher would specialize: ones and 16-divisibility."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1:
            signature[name], constants[name], aligned = "constexpr", 1, False
        else:
            signature[name], aligned = "i32", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name in names[len(launch.arguments) :]:
        signature[name], constants[name] = "constexpr", launch.options[name]
    return signature, constants, attributes, {k: v for k, v in launch.options.items() if k not in names}


def _read_cubin(asm: dict) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"], len(re.findall(r"^\s+/\*[0-9a-f]+\*/", sass, re.M))


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(asm: dict) -> tuple[int, int, int]:
    text = asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
    scratch = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    return registers, scratch, len(re.findall(r"^\s+[a-z]+_\w+ ", text, re.M))


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resq_compiler.backends.triton.aot", description="compile kernels ahead of time"
    )
    parser.add_argument("--target", action="append", choices=sorted(GPUS), help="default: all")
    parser.add_argument("--case", action="append", help="module/name, or a part of it; default: all")
    parser.add_argument(
        "--dtype", choices=sorted(FLOATS), default="float16", help="of what is not integer (default: float16)"
    )
    parser.add_argument("--list", action="store_true", help="print the case names and stop")
    options = parser.parse_args(arguments)
    chosen = [(n, c) for n, c in cases() if not options.case or any(part in n for part in options.case)]
    if not chosen:
        print(f"aot: no case matches {options.case}; see --list", file=sys.stderr)
        return 2
    for name, call in chosen:
        for target in [] if options.list else options.target or GPUS:
            with floats_of(FLOATS[options.dtype]):
                for compiled in compile_case(name, call, GPUS[target]):
                    print(json.dumps(asdict(compiled)), flush=True)
        if options.list:
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
