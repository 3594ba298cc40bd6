"""Kernels compiled for GPUs that are not here: tensor cores, wide loads, no spills, limits. In a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from resq_compiler.backends.triton import aot
from resq_compiler.backends.triton.gpus import GPUS

from resq_compiler.errors import BackendError

INTEGER_OPCODES = {
    "sm_80": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_86": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_89": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma_i32",
}


EXPANDING = ("_nibbles_kernel", "_images_kernel")
SPILLED_OUTSIDE_OF_LOOPS = {("mixed_linear/prefill_o_8b", "sm_90"): 8, ("mixed_linear/prefill_down_8b", "sm_90"): 72}
"""Bytes of tiles that were the fastest of those measured on an H100."""


def compile_in_subprocess(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "resq_compiler.backends.triton.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error:" not in done.stderr, done.stderr[-3000:]  # LLVM reports a bad assembly constraint and goes on
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernel: dict) -> None:
    target, name = GPUS[kernel["target"]], kernel["case"]
    assert kernel["shared"] <= target.shared_block, kernel
    assert kernel["spills"] <= SPILLED_OUTSIDE_OF_LOOPS.get((name, target.name), 0), kernel
    assert kernel["occupancy"] > 0, kernel
    if kernel["kernel"] in EXPANDING:
        return
    if name.startswith(("mixed_linear/", "grouped_linear/")):
        opcodes = " ".join(kernel["matrix"])
        integer = INTEGER_OPCODES["sm_80" if "decode" in name and target.backend == "cuda" else target.name]
        assert integer in opcodes, kernel  # 16 rows are too few for wgmma and tcgen05
        assert "f16" not in opcodes, kernel
    if name.startswith(("mixed_linear/", "norm_quantize/", "hadamard_quantize/")) and target.backend == "cuda":
        assert kernel["wide_loads"] > 0, kernel


def test_one_matrix_kernel_and_one_row_kernel():
    kernels = compile_in_subprocess(
        "--target", "sm_86", "--case", "mixed_linear/decode_qkv_8b", "--case", "norm_quantize/smollm2"
    )
    assert len(kernels) == 2
    for kernel in kernels:
        check(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
def test_every_kernel_on(target):
    kernels = compile_in_subprocess("--target", target)
    assert {kernel["case"] for kernel in kernels} == {name for name, _ in aot.cases()}
    failed = []
    for kernel in kernels:
        try:
            check(kernel)
        except AssertionError as e:
            failed.append(str(e))
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_float32_does_not_spill_with_heads_of_up_to_128_columns():
    """Attention in float32 takes three tf32 products for each: three times the registers."""
    kernels = compile_in_subprocess("--target", "sm_86", "--dtype", "float32")
    assert {kernel["case"] for kernel in kernels} == {name for name, _ in aot.cases()}
    spilling = {kernel["case"] for kernel in kernels if kernel["spills"]}
    assert spilling <= {"attention/prefill_gemma2", "attention/decode_gemma2"}, kernels  # heads of 256


@pytest.mark.slow
def test_unpacking_is_three_instructions_for_eight_columns():
    """Masking four bytes at a time: without it the loop has 1729 instructions for 64 matrix instructions, with it 342."""
    (kernel,) = compile_in_subprocess("--target", "sm_86", "--case", "mixed_linear/prefill_down_8b")
    assert kernel["instructions"] < 2000


def test_an_interpreting_process_says_so():
    name, call = next(iter(aot.cases()))
    with pytest.raises(BackendError, match="TRITON_INTERPRET"):
        aot.compile_case(name, call, GPUS["sm_80"])
