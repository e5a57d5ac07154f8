"""Builds engine/model/_cpu_kernels.so; everything else is in pyproject.toml.

Each kernel is compiled once for each of its instruction sets, and all are linked into one library,
without an OpenMP runtime: torch's own is bound when it is loaded. Where it cannot be compiled the
install still succeeds, and the server runs on torch operations.
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ATTENTION = Path("engine/model/attention/cpu_kernel.cpp")
LINEAR = Path("engine/model/cpu_linear.cpp")
DRAW = Path("engine/execution/cpu_draw.cpp")
STACK = Path("engine/model/cpu_stack.cpp")
HEADERS = sorted(Path("engine/model").glob("cpu_*.h"))
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
INSTRUCTIONS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
KERNELS = {ATTENTION: ["generic"], LINEAR: [], STACK: ["generic"], DRAW: ["generic"]}
if platform.machine() in ("x86_64", "AMD64"):
    KERNELS = {
        ATTENTION: ["generic", "avx2", "avx512"],
        LINEAR: ["avx2", "avx512", "avx512bf16"],
        STACK: ["generic"],
        DRAW: ["generic", "avx2", "avx512"],
    }


class BuildKernel(build_ext):
    """Compiles a library that ctypes loads: no Python headers, no interpreter in its name."""

    def get_ext_filename(self, fullname):
        """Where the library goes, from the root of the packages."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        """Compile and link, or warn."""
        compiler = shlex.split(os.environ.get("CXX") or os.environ.get("CC") or "c++")
        library = Path(self.get_ext_fullpath(ext.name))
        temporary = Path(self.build_temp)
        for folder in (library.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        objects = []
        try:
            for source, variants in KERNELS.items():
                for variant in variants:
                    target = str(temporary / f"{source.stem}_{variant}.o")
                    flags = [*FLAGS, *INSTRUCTIONS[variant], f"-DVARIANT={variant}"]
                    self._call([*compiler, *flags, "-c", str(source), "-o", target])
                    objects.append(target)
            self._call([*compiler, "-shared", "-o", str(library), *objects])
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"no CPU kernels: {error}; the model will run on slower torch operations")

    def _call(self, command):
        self.announce(shlex.join(command), level=2)
        subprocess.run(command, check=True)


setup(
    ext_modules=[
        Extension(
            "engine.model._cpu_kernels",
            [str(source) for source in KERNELS],
            depends=[str(header) for header in HEADERS],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
