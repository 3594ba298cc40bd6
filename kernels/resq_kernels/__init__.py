"""Where the shared library of resq_compiler's CPU kernels is. It has a plain C interface (resq_kernels.h) and needs no other library.

Its sources come along, so that it can be compiled for other platforms.
"""

import sys
from pathlib import Path

LIBRARY = Path(__file__).parent / ("libresq_kernels.dylib" if sys.platform == "darwin" else "libresq_kernels.so")


def build_for(platform: str, folder: Path) -> Path:
    """Compile the library for another platform, such as linux-aarch64, into a folder. Raises SystemExit: unknown, or ziglang is missing."""
    from resq_kernels import build_library

    compiler, machine = build_library.cross_compiler(platform), platform.partition("-")[2]
    return build_library.build(folder, folder / "objects", compiler, machine)
