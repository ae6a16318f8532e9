"""The kernels: one shared library for Linux on x86-64, without anything of Python in it, so that one wheel is for every
Python. Elsewhere wheels are pure, and torch's kernels do the work.

GRIFFIN_KERNELS=required fails where a compiler does, as published wheels need it; =none leaves them out. Without it
they are compiled if that is possible.
"""

import os
import platform
import sys
from glob import glob

from setuptools import Extension, setup

CHOICES = ("", "required", "none")
SOURCES = "griffin_offload/kernels/csrc"
OLDEST_PYTHON = "cp310"

wanted = os.environ.get("GRIFFIN_KERNELS", "")
if wanted not in CHOICES:
    sys.exit(f"GRIFFIN_KERNELS is {wanted!r}: required, none, or not set")
here = sys.platform == "linux" and platform.machine() == "x86_64"
if wanted == "required" and not here:
    sys.exit("GRIFFIN_KERNELS=required: there are kernels for Linux on x86-64 alone")
library = Extension(
    "griffin_offload.kernels._library",
    sources=sorted(glob(f"{SOURCES}/*.c")),
    depends=sorted(glob(f"{SOURCES}/*.h")),
    extra_compile_args=["-std=c11", "-O3", "-fno-math-errno"],
    optional=wanted != "required",
    py_limited_api=True,
)
if here and wanted != "none":
    setup(ext_modules=[library], options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}})
else:
    setup()
