"""Builds wheels. Everything is declared in pyproject.toml but this: INNERQ_BUILD_KERNELS=1 compiles the CPU kernels
into the wheel, for the torch that is installed where it is built (kernels/cpu/prebuilt.py says what that ties it to).
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_KERNELS = os.environ.get("INNERQ_BUILD_KERNELS") == "1"


class BuildWithKernels(build_py):
    """Adds the compiled kernels to the Python files."""

    def run(self) -> None:
        """Copies the Python files, then compiles."""
        super().run()
        if WITH_KERNELS and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent))
            from innerq_compile.kernels.cpu import prebuilt

            prebuilt.build_all(Path(self.build_lib, "innerq_compile", "kernels", "cpu", prebuilt.FOLDER.name))


class PerPlatform(Distribution):
    """A wheel with kernels serves one platform."""

    def has_ext_modules(self) -> bool:
        """Whether there is compiled code."""
        return WITH_KERNELS


class ForEveryPython(bdist_wheel):
    """And it serves every Python: the kernels do not use Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of Python, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": ForEveryPython}, distclass=PerPlatform)
