"""`make gpu-check`: what cannot be tried without a GPU, in one run that needs little.

    python -m loadtest.gpu.check [--json FILE] [--no-benchmark | --no-checks] [--only TEXT]
    TRITON_INTERPRET=1 python -m loadtest.gpu.check --interpret

from the root of the checkout, where PyTorch >= 2.11 for CUDA, Triton >= 3.6, numpy and safetensors
are installed; nothing else is needed (msgspec is taken where it is there, and transformers, to
compare with). The second way tries a little of everything on a CPU, at toy sizes: its figures mean
nothing. Progress and tables go to standard error, one JSON document to standard output. Exits with
1 if a check does not hold.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from loadtest.gpu.report import Report


def about() -> dict[str, Any]:
    """The machine and the libraries."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if not torch.cuda.is_available():
        return {"device": "none", **versions}
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "processors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        **versions,
    }


def provide_structs() -> None:
    """Let the engine find its structs where msgspec is not installed."""
    try:
        import_module("msgspec")
    except ImportError:
        sys.modules["msgspec"] = import_module("loadtest.gpu.plain_structs")


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, report."""
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check the CUDA path on this machine, and measure it."
    )
    parser.add_argument("--json", type=Path, help="write the document to this file as well")
    parser.add_argument("--no-benchmark", action="store_true", help="correctness only")
    parser.add_argument("--no-checks", action="store_true", help="the benchmark only")
    parser.add_argument("--only", default="", help="parts whose name contains this text")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each generation")
    parser.add_argument("--batches", default="1,8,64,256", help="sequences at once, by commas")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="a little of everything on the CPU, under Triton's interpreter",
    )
    options = parser.parse_args(arguments)
    if options.interpret != bool(knobs.runtime.interpret):
        parser.error("--interpret and TRITON_INTERPRET=1 in the environment belong together")
    if not options.interpret and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; --interpret works without")
    try:
        batches = [int(each) for each in options.batches.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1 or options.repeats < 1:
        parser.error("--batches and --repeats must be numbers from 1")
    provide_structs()
    scale, engine, graphs, kernels, tokens, stands, benchmark = (
        import_module(name)
        for name in (
            "loadtest.gpu.scale",
            "loadtest.gpu.engine",
            "engine.execution.cuda_graphs",
            "loadtest.gpu.kernels",
            "loadtest.gpu.tokens",
            "loadtest.gpu.stand",
            "loadtest.gpu.benchmark",
        )
    )
    make_recorder = engine.Again if options.interpret else graphs.CudaRecorder
    report = Report(about(), options.only)
    if not options.no_checks:
        size = scale.SMALL if options.interpret else scale.Scale(device="cuda")
        kernels.check_kernels(report, size)
        tokens.check_tokens(report, size, make_recorder)
    if not options.no_benchmark:
        stand = stands.TOY if options.interpret else stands.on_gpu(options.repeats, batches)
        benchmark.measure_all(report, stand)
    report.close(options.json)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
