"""`make gpu-check`: what cannot be tried without a GPU, in one run that needs little.

    python -m loadtest.gpu_check [--json FILE] [--no-benchmark | --no-checks] [--only TEXT]
    TRITON_INTERPRET=1 python -m loadtest.gpu_check --interpret

from the root of the checkout, where PyTorch >= 2.11 for CUDA, Triton >= 3.6, numpy and safetensors
are installed; nothing else is imported (transformers, where it is there, to compare with). The
second way tries the correctness half on a CPU, a little of it. Progress and tables go to standard
error, one JSON document to standard output. Exits with 1 if a check does not hold.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from engine.execution.cuda_graphs import CudaRecorder
from loadtest.gpu_benchmark import measure_all
from loadtest.gpu_correctness import SMALL, Scale, check_all
from loadtest.gpu_report import Report


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
        help="a little of the correctness half on the CPU, under Triton's interpreter",
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
    report = Report(about(), options.only)
    if not options.no_checks:
        if options.interpret:
            check_all(report, SMALL, lambda work: work)
        else:
            check_all(report, Scale(device="cuda"), CudaRecorder())
    if not options.no_benchmark and not options.interpret:
        measure_all(report, options.repeats, batches)
    report.close(options.json)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
