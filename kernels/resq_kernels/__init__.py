"""Where the shared library of resq_compiler's CPU kernels is. It has a plain C interface (resq_kernels.h) and needs no other library."""

import sys
from pathlib import Path

LIBRARY = Path(__file__).parent / ("libresq_kernels.dylib" if sys.platform == "darwin" else "libresq_kernels.so")
