"""Builds the library into the wheel, with the system's C compiler or, where there is none, with the one in PyPI's ziglang."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from build_library import build, system_compiler


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        build(Path(self.build_lib) / "resq_kernels", Path("build") / "objects")


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=["resq_kernels"],
    setup_requires=[] if system_compiler() else ["ziglang"],
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
)
