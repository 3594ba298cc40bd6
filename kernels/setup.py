"""Builds the library into the wheel, with the system's C compiler or, where there is none, with the one in PyPI's ziglang.

RESQ_KERNELS_PLATFORM=linux-aarch64 (or linux-x86_64) builds it for that platform, with ziglang, as a manylinux wheel.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from build_library import SOURCES, build, cross_compiler, system_compiler

TARGET = os.environ.get("RESQ_KERNELS_PLATFORM", "")


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        package = Path(self.build_lib) / "resq_kernels"
        shutil.copytree(SOURCES, package / "src", dirs_exist_ok=True)
        shutil.copy(SOURCES.parent / "build_library.py", package)
        compiler, machine = (cross_compiler(TARGET), TARGET.partition("-")[2]) if TARGET else (None, None)
        build(package, Path("build") / f"objects-{TARGET}", compiler, machine)


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        machine = TARGET.partition("-")[2]
        return "py3", "none", f"manylinux2014_{machine}" if TARGET else super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=["resq_kernels"],
    setup_requires=[] if system_compiler() and not TARGET else ["ziglang"],
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
)
