"""Describes the extension; everything else is in pyproject.toml.

RELSTREAM_DEBUG=1 builds it with line tracing (for coverage and profilers), bounds checks,
assertions and counts of live objects, and leaves a page under build/ that shows the C of each line.
RELSTREAM_SANITIZE=1 builds it with AddressSanitizer and UndefinedBehaviorSanitizer: Python has to
be started with the first one's library in LD_PRELOAD.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = os.environ.get("RELSTREAM_DEBUG") == "1"
sanitize = os.environ.get("RELSTREAM_SANITIZE") == "1"

compile_args = ["-O3"]
# Six sevenths of a release would be symbols that only a debugger reads.
link_args = ["-Wl,--strip-all"] if sys.platform == "linux" else []
macros = [("CYTHON_WITHOUT_ASSERTIONS", "1")]
if debug:
    compile_args, link_args = ["-O0", "-g"], []
    macros = [("CYTHON_TRACE_NOGIL", "1"), ("RELSTREAM_DEBUG", "1")]
if sanitize:
    link_args = ["-fsanitize=address,undefined"]
    compile_args = [
        *["-O0", "-g", "-fno-omit-frame-pointer", *link_args, "-fno-sanitize-recover=undefined"],
        # Python's own flags define what happens when a number overflows: it would be missed.
        "-fno-wrapv",
    ]
if debug or sanitize:
    # Freelists would hide objects from being counted, and those that are used after their end.
    macros.append(("CYTHON_USE_FREELISTS", "0"))

core = Extension(
    "relstream._core",
    ["relstream/_core.pyx"],
    depends=[str(path) for path in Path("relstream/core").glob("*.pxi")],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    define_macros=macros,
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
