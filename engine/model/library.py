"""The compiled kernels of this package: one library, bound to torch's OpenMP runtime."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

LIBRARY = Path(__file__).with_name("_cpu_kernels.so")
VARIANTS = ("avx512bf16", "avx512", "avx2", "generic")
"""Instruction sets that kernels are compiled for, best first; not every kernel for each."""


class KernelUnavailableError(Exception):
    """The compiled kernel cannot be used here; the message says why."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library, bound to the OpenMP runtime that torch already uses.

    It is linked without one, so that its parallel regions run on torch's own threads: two pools
    on the same cores would fight.
    """
    if not LIBRARY.exists():
        raise KernelUnavailableError("no compiled kernel: installed without a C++ compiler")
    # A torch that brings no runtime was linked to the system's.
    for runtime in _bundled_runtimes() or ["libgomp.so.1"]:
        try:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(LIBRARY))
        except OSError as error:
            obstacle = error
    raise KernelUnavailableError(f"the compiled kernel does not load: {obstacle}")


def _bundled_runtimes() -> list[str]:
    """OpenMP runtimes that came with torch: GNU's, Intel's or LLVM's; all serve GNU's calls."""
    torch_lib = Path(torch.__file__).parent / "lib"
    names = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*")
    return [str(path) for name in names for path in sorted(torch_lib.glob(name))]


def supported_variants(kernel: str) -> tuple[str, ...]:
    """Variants of a kernel that were compiled and that this machine can run, best first.

    Raises KernelUnavailableError when nothing was compiled, or it does not load.
    """
    library = load_library()
    names = [name for name in VARIANTS if hasattr(library, f"ropeway_supports_{kernel}_{name}")]
    return tuple(name for name in names if library[f"ropeway_supports_{kernel}_{name}"]())


def load_kernel(
    kernel: str,
    argument_types: Sequence[type],
    variant: str | None = None,
    function: str | None = None,
) -> tuple[str, Callable[..., int]]:
    """Name and function of the best variant for this machine, or of the one asked for.

    argument_types: the function's, in ctypes' terms; it returns an int. function: another one of
    the same kernel. Raises KernelUnavailableError, as supported_variants, or when the variant is
    not among them.
    """
    supported = supported_variants(kernel)
    chosen = variant or next(iter(supported), "of any kind")
    if chosen not in supported:
        known = ", ".join(supported) or "none"
        raise KernelUnavailableError(f"variant {chosen!r} is not among this machine's: {known}")
    loaded = load_library()[f"ropeway_{function or kernel}_{chosen}"]
    loaded.argtypes = argument_types
    loaded.restype = ctypes.c_int
    return chosen, loaded


def address_of(function: Callable[..., int]) -> int:
    """Where a function of load_kernel begins, for a kernel that calls it."""
    address = ctypes.cast(cast(Any, function), ctypes.c_void_p).value
    assert address is not None, "a loaded function has an address"
    return address
