"""Compile the kernels: kernels.c once for each instruction set, then everything into one shared library.

    python kernels/build_library.py OUTPUT_DIR [--compiler "gcc"] [--machine aarch64] [--sanitize]

Needs GCC 11 or Clang 13 or newer ($CC, cc, gcc or clang), or the Python package ziglang, which brings a C compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
FLAGS = [
    "-std=gnu11",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer"]
GCC_ONLY = ["-fno-tree-pre", "-fno-gcse", "-Wno-psabi"]  # without the first two GCC keeps accumulators in memory
AVX2 = ["-mavx2", "-mfma"]
AVX512VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": [*AVX512VNNI, "-mamx-tile", "-mamx-int8"],
        "avx512vnni": AVX512VNNI,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx2": AVX2,
        "portable": [],
    },
    "aarch64": {
        "neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
        "neon_dotprod": ["-march=armv8.2-a+dotprod"],
        "portable": [],
    },
}
"""Flags of every instruction set, by machine; others have only the portable one."""
COMMON = (
    "dispatch",
    "sizes",
    "onnx_operators",
    "onnx_linears",
    "onnx_attention",
    "onnx_latent",
    "onnx_experts",
    "onnx_rows",
    "onnx_small",
    "onnx_chain",
)
"""Files that do not depend on the instruction set."""


PLATFORMS = {"linux-x86_64": "x86_64-linux-gnu.2.17", "linux-aarch64": "aarch64-linux-gnu.2.17"}
"""What can be compiled for from any machine, and what ziglang calls it: glibc 2.17 is that of manylinux2014 wheels."""


def system_compiler() -> list[str] | None:
    """The command of the machine's C compiler: $CC, else cc, gcc or clang; None when there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def find_compiler() -> list[str]:
    """system_compiler, else ziglang's. Raises SystemExit that says what to install."""
    command = system_compiler()
    if command is None and importlib.util.find_spec("ziglang"):
        command = [sys.executable, "-m", "ziglang", "cc"]
    if command is None:
        raise SystemExit("error: no C compiler (looked for $CC, cc, gcc, clang); install one, or: pip install ziglang")
    return command


def cross_compiler(platform_name: str) -> list[str]:
    """ziglang's command for one of PLATFORMS. Raises SystemExit: no such platform, or ziglang is not installed."""
    if platform_name not in PLATFORMS:
        raise SystemExit(f"error: platform {platform_name!r}: expected one of {', '.join(PLATFORMS)}")
    if importlib.util.find_spec("ziglang") is None:
        raise SystemExit(f"error: building for {platform_name} needs ziglang; run: pip install ziglang")
    return [sys.executable, "-m", "ziglang", "cc", "-target", PLATFORMS[platform_name]]


def host_platform() -> str:
    """This machine as PLATFORMS spells it."""
    return f"{platform.system().lower()}-{machine_name()}"


def machine_name(name: str | None = None) -> str:
    """The architecture as INSTRUCTION_SETS spells it."""
    name = (name or platform.machine()).lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def zig_flags(flags: list[str]) -> list[str]:
    """The same with processors as ziglang spells them: -march=armv8.2-a+x is -mcpu=generic+v8_2a+x."""
    return [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in flags]


def is_gcc(compiler: list[str]) -> bool:
    """Whether the compiler takes GCC's own flags."""
    probe = subprocess.run([*compiler, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True)
    return "__clang__" not in probe.stdout


def build(
    output: Path, objects: Path, compiler: list[str] | None = None, machine: str | None = None, sanitize: bool = False
) -> Path:
    """Compile into `objects` and link into `output`; returns the library. Raises CalledProcessError where the compiler fails."""
    compiler, machine = compiler or find_compiler(), machine_name(machine)
    flags = FLAGS + (GCC_ONLY if is_gcc(compiler) else []) + (SANITIZE if sanitize else [])
    output.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    jobs = [
        ("kernels.c", name, [f"-DRK_ISA={name}", f"-DRK_{name.upper()}", *extra]) for name, extra in sets_of(machine)
    ]
    jobs += [(f"{name}.c", name, []) for name in COMMON]
    made = [objects / f"{name}.o" for _, name, _ in jobs]

    def compile_one(i: int) -> None:
        source, _, extra = jobs[i]
        extra = zig_flags(extra) if "ziglang" in compiler else extra
        run([*compiler, *flags, *extra, "-c", str(SOURCES / source), "-o", str(made[i])])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, range(len(jobs))))
    library = output / ("libresq_kernels.dylib" if sys.platform == "darwin" else "libresq_kernels.so")
    run([*compiler, "-shared", *(SANITIZE if sanitize else []), "-o", str(library), *map(str, made)])
    return library


def sets_of(machine: str) -> list[tuple[str, list[str]]]:
    """(name, flags) of every instruction set to compile for a machine."""
    return list(INSTRUCTION_SETS.get(machine, {"portable": []}).items())


def run(command: list[str]) -> None:
    """Run a compiler; what it says goes to stderr."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CPU kernels into a shared library.")
    parser.add_argument("output", type=Path, help="directory of the library; objects go to objects/ in it")
    parser.add_argument(
        "--compiler", type=shlex.split, help='command, as "aarch64-linux-gnu-gcc" (default: the machine\'s)'
    )
    parser.add_argument("--machine", help="x86_64 or aarch64, when it is not this one")
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour sanitizers")
    args = parser.parse_args()
    print(build(args.output, args.output / "objects", args.compiler, args.machine, args.sanitize))


if __name__ == "__main__":
    main()
