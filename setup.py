"""Describes the extension; everything else is in pyproject.toml.

RELSTREAM_DEBUG=1 builds it with line tracing (for coverage and profilers), bounds checks,
assertions and counts of live objects, and leaves a page under build/ that shows the C of every
line.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("RELSTREAM_DEBUG") == "1"

core = Extension(
    "relstream._core",
    ["relstream/_core.pyx"],
    depends=[str(path) for path in Path("relstream/core").glob("*.pxi")],
    extra_compile_args=["-O0", "-g"] if debug else ["-O3"],
    # Three quarters of a release would be symbols that only a debugger reads.
    extra_link_args=[] if debug or sys.platform != "linux" else ["-Wl,--strip-all"],
    define_macros=(
        # Freelists would hide objects from being counted.
        [("CYTHON_TRACE_NOGIL", "1"), ("RELSTREAM_DEBUG", "1"), ("CYTHON_USE_FREELISTS", "0")]
        if debug
        else [("CYTHON_WITHOUT_ASSERTIONS", "1")]
    ),
    undef_macros=["NDEBUG"] if debug else [],
)

setup(
    ext_modules=cythonize(
        core,
        # One folder for each way to build: Cython looks at times, not at directives.
        build_dir="build/cython-debug" if debug else "build/cython",
        annotate=debug,
        compiler_directives={
            "language_level": 3,
            "boundscheck": debug,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": debug,
            "nonecheck": debug,
            "linetrace": debug,
        },
    ),
    # For the same reason the compiled module of the other way must not pass as up to date.
    options={"build_ext": {"force": True}},
)
