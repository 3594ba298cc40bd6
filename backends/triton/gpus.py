"""GPUs the kernels are compiled for, with the limits a launch must respect and the data-sheet figures forecasts use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One architecture, with the device that stands for it.

    processors: streaming multiprocessors (compute units).    shared_block, shared_processor: bytes of shared memory (LDS).
    registers: 32-bit registers of a processor.    warps: resident warps of a processor.    bandwidth: bytes/s.
    float16, int8: dense tensor-core operations/s (a multiply-add is two), float16 with float32 accumulation.
    """

    name: str
    backend: str
    arch: int | str
    device: str
    processors: int
    shared_block: int
    shared_processor: int
    registers: int
    warps: int
    warp_size: int
    bandwidth: float
    float16: float
    int8: float

    @property
    def isa(self) -> str:
        return "ptx" if self.backend == "cuda" else "gcn"


def _nvidia(name, device, processors, shared_block, shared_processor, warps, bandwidth, float16, int8) -> Gpu:
    return Gpu(
        name, "cuda", int(name.removeprefix("sm_")), device, processors, shared_block, shared_processor, 65536, warps, 32,
        bandwidth, float16, int8,
    )  # fmt: skip


# Limits: CUDA C++ Programming Guide, "Compute Capabilities"; AMD CDNA 3 ISA guide. Rates: the vendors' data sheets, no sparsity.
GPUS = {
    target.name: target
    for target in (
        _nvidia("sm_80", "A100 80 GB SXM", 108, 166912, 167936, 64, 2.039e12, 312e12, 624e12),
        _nvidia("sm_86", "RTX 3090", 82, 101376, 102400, 48, 0.936e12, 71e12, 284e12),
        _nvidia("sm_89", "RTX 4090", 128, 101376, 102400, 48, 1.008e12, 165e12, 661e12),
        _nvidia("sm_90", "H100 SXM", 132, 232448, 233472, 64, 3.35e12, 989e12, 1979e12),
        _nvidia("sm_100", "B200", 148, 232448, 233472, 64, 8.0e12, 2250e12, 4500e12),
        Gpu("gfx942", "hip", "gfx942", "MI300X", 304, 65536, 65536, 131072, 32, 64, 5.3e12, 1307e12, 2615e12),
    )
}
