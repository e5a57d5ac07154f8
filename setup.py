"""Builds engine/model/attention/_cpu_kernel.so; everything else is in pyproject.toml.

The kernel is compiled once for each instruction set and linked into one library, without an OpenMP
runtime: torch's own is bound when it is loaded. Where it cannot be compiled the install still
succeeds, and the server runs on torch operations.
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path("engine/model/attention/cpu_kernel.cpp")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"]
VARIANTS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


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
        objects = {variant: temporary / f"{SOURCE.stem}_{variant}.o" for variant in VARIANTS}
        try:
            for variant, target in objects.items():
                flags = [*FLAGS, *VARIANTS[variant], f"-DVARIANT={variant}"]
                self._call([*compiler, *flags, "-c", str(SOURCE), "-o", str(target)])
            self._call([*compiler, "-shared", "-o", str(library), *map(str, objects.values())])
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"no CPU kernel: {error}; attention will run on slower torch operations")

    def _call(self, command):
        self.announce(shlex.join(command), level=2)
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("engine.model.attention._cpu_kernel", [str(SOURCE)], optional=True)],
    cmdclass={"build_ext": BuildKernel},
)
