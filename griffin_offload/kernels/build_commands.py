"""setuptools' commands for the kernels, which it loads from this file alone; nothing of the package is imported.

One shared library for Linux on x86-64, without anything of Python in it, so that one wheel is for every Python.
Elsewhere wheels are pure, and torch's kernels do the work. GRIFFIN_KERNELS=required fails where a compiler does, as
published wheels need it; =none leaves them out. Without it they are compiled if that is possible.
"""

import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

_CHOICES = ("", "required", "none")


def _choose(distribution: Distribution) -> None:
    """Leave the library out, or insist on it."""
    wanted = os.environ.get("GRIFFIN_KERNELS", "")
    if wanted not in _CHOICES:
        sys.exit(f"GRIFFIN_KERNELS is {wanted!r}: required, none, or not set")
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    if wanted == "required" and not here:
        sys.exit("GRIFFIN_KERNELS=required: there are kernels for Linux on x86-64 alone")
    if wanted == "none" or not here:
        distribution.ext_modules = []
    for library in distribution.ext_modules or ():
        library.optional = wanted != "required"


class BuildLibrary(build_ext):  # type: ignore[misc]  # setuptools has no types for them
    """Compiles it, or not; as many files at once as there are processors, which setuptools does of libraries alone."""

    def finalize_options(self) -> None:
        _choose(self.distribution)
        super().finalize_options()

    def build_extensions(self) -> None:
        one_by_one = self.compiler.compile

        def together(sources: Sequence[str], *options: Any, **named: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: one_by_one([source], *options, **named), sources)
                return [name for names in made for name in names]

        self.compiler.compile = together
        super().build_extensions()


class SourceArchive(sdist):  # type: ignore[misc]
    """Without the tests: setuptools takes a part of them, which cannot run without the others."""

    def make_distribution(self) -> None:
        self.filelist.prune("tests")
        super().make_distribution()


class Wheel(bdist_wheel):  # type: ignore[misc]
    """Pure where there is no library in it."""

    def finalize_options(self) -> None:
        _choose(self.distribution)
        super().finalize_options()
