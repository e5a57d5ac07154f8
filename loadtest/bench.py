"""`ropeway bench`: figures that anyone can reproduce, beside what the machine could do at best."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine import LLM
from engine.messages import EngineReady
from engine.model.loader import read_config
from loadtest.chaos import chaos
from loadtest.determinism import Load, compare
from loadtest.machine import Machine
from loadtest.quality import quality
from loadtest.workload import Measured, Workload, run_http, run_offline, served

app = typer.Typer(
    help="Measure this machine's latency and throughput, as JSON and as a table.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Option(help="Model directory.", show_default="the shipped model")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(help="Engine threads.", show_default="one per core")]
Prompt = Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)]
Output = Annotated[int, typer.Option(help="Tokens generated for each prompt.", min=2)]
Repeats = Annotated[int, typer.Option(help="Runs of each figure; the median counts.", min=1)]
Http = Annotated[bool, typer.Option(help="Measure over HTTP too.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write JSON here as well as to stdout.")]
DEFAULT_MODEL = Path(__file__).parent.parent / "weights" / "default"


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(runs: Sequence[Measured]) -> dict[str, Any]:
    """What several runs of one workload come to."""
    gaps = [[1000 * gap for gap in run.gaps_s] for run in runs]
    return {
        "tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "decode_tokens_per_s": spread([run.decode_tokens_per_s for run in runs]),
        "first_token_ms": spread([1000 * statistics.median(run.first_token_s) for run in runs]),
        "gap_ms_median": spread([statistics.median(each) for each in gaps], 2),
        "gap_ms_p95": spread([percentile(each, 0.95) for each in gaps], 2),
    }


def read_limit(info: EngineReady, machine: Machine, workload: Workload) -> float | None:
    """Decode tokens a second if every weight and every cached byte were read at full bandwidth.

    None on CUDA: the bandwidth that was measured is the CPU's.
    """
    if info.device != "cpu":
        return None
    itemsize = 2 if info.dtype == "bfloat16" else 4
    page_bytes = info.kv_bytes / info.num_blocks
    context = workload.prompt_tokens + workload.output_tokens / 2
    cached = workload.streams * context * page_bytes / info.block_size
    step = (info.num_parameters * itemsize + cached) / (machine.read_gb_s * 1e9)
    return workload.streams / step


def measure(
    model: Path,
    dtype: str,
    threads: int | None,
    workloads: Sequence[Workload],
    repeats: int,
    http: bool,
) -> dict[str, Any]:
    """Every workload offline, and over HTTP where asked; repeats alternate between the two."""
    llm = LLM(model, dtype=dtype, threads=threads)  # type: ignore[arg-type]  # checked by LLM
    info = llm.info
    machine = Machine.measure(getattr(torch, info.dtype))
    options = ["--dtype", info.dtype, "--threads", str(info.threads)]
    results = []
    console = Console(stderr=True)
    with ExitStack() as stack:
        url = stack.enter_context(served(model, options)) if http else None
        progress = stack.enter_context(Progress(console=console, transient=True))
        task = progress.add_task("measuring", total=len(workloads) * (repeats + 1))
        for workload in workloads:
            runs: dict[str, list[Measured]] = {"offline": []}
            if url is not None:
                runs["http"] = []
            for repeat in range(repeats + 1):
                offline = run_offline(llm, workload, repeat)
                over_http = asyncio.run(run_http(url, workload, repeat)) if url else None
                if repeat:  # the first run warms up
                    runs["offline"].append(offline)
                    if over_http is not None:
                        runs["http"].append(over_http)
                progress.advance(task)
            limit = read_limit(info, machine, workload)
            for path, each in runs.items():
                result = {"path": path, **asdict(workload), **figures(each)}
                if limit is not None:
                    result["read_limit_tokens_per_s"] = round(limit, 1)
                    share = result["decode_tokens_per_s"]["median"] / limit
                    result["of_read_limit"] = round(share, 3)
                results.append(result)
    return {
        "model": {"name": info.model, "parameters": info.num_parameters},
        "engine": {"dtype": info.dtype, "device": info.device, "attention": info.attention},
        "machine": asdict(machine),
        "repeats": repeats,
        "results": results,
    }


def report(title: str, document: dict[str, Any], path: Path | None) -> None:
    """JSON to standard output, a table to standard error."""
    text = json.dumps(document, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
    model, machine, engine = document["model"], document["machine"], document["engine"]
    table = Table(
        title=f"{title}: {model['name']}, {engine['dtype']}, {machine['threads']} threads, "
        f"reads {machine['read_gb_s']} GB/s, multiplies {machine['gemm_gflop_s']} GFLOP/s"
    )
    for column in (
        "path",
        "streams",
        "tokens/s",
        "decode tokens/s",
        "of read limit",
        "first token ms",
        "gap ms",
        "gap ms p95",
    ):
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in document["results"]:
        table.add_row(
            row["path"],
            str(row["streams"]),
            _ranged(row["tokens_per_s"]),
            _ranged(row["decode_tokens_per_s"]),
            f"{100 * row['of_read_limit']:.0f} %" if "of_read_limit" in row else "",
            _ranged(row["first_token_ms"]),
            _ranged(row["gap_ms_median"]),
            _ranged(row["gap_ms_p95"]),
        )
    Console(stderr=True, width=None if sys.stderr.isatty() else 140).print(table)


def _ranged(value: dict[str, float]) -> str:
    return f"{value['median']} ({value['min']}-{value['max']})"


@app.command()
def latency(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    prompt_tokens: Prompt = 128,
    output_tokens: Output = 128,
    repeats: Repeats = 5,
    http: Http = True,
    json_file: Json = None,
) -> None:
    """One stream: time to the first token, and from token to token."""
    workload = Workload(1, prompt_tokens, output_tokens, read_config(model).vocab_size)
    document = measure(model, dtype, threads, [workload], repeats, http)
    report("latency", {"command": "latency", **document}, json_file)


@app.command()
def throughput(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    prompt_tokens: Prompt = 128,
    output_tokens: Output = 128,
    repeats: Repeats = 3,
    http: Http = True,
    streams: Annotated[str, typer.Option(help="Streams at once, by commas.")] = "1,8,16,32",
    json_file: Json = None,
) -> None:
    """Several streams at once: tokens a second of all together."""
    try:
        counts = [int(count) for count in streams.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise typer.BadParameter(f"--streams must be numbers from 1, by commas, got {streams!r}")
    size = read_config(model).vocab_size
    workloads = [Workload(count, prompt_tokens, output_tokens, size) for count in counts]
    document = measure(model, dtype, threads, workloads, repeats, http)
    report("throughput", {"command": "throughput", **document}, json_file)


@app.command()
def determinism(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    requests: Annotated[int, typer.Option(help="Different requests.", min=2)] = 32,
    prompt_tokens: Prompt = 128,
    output_tokens: Output = 64,
    json_file: Json = None,
) -> None:
    """The same requests alone, together, cached, chunked and preempted: how many differ in a bit.

    Exits with 1 if any does.
    """
    load = Load(requests, prompt_tokens, output_tokens, read_config(model).vocab_size)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=5)
        document = compare(model, dtype, threads, load, lambda: progress.advance(task))
    text = json.dumps({"command": "determinism", **document}, indent=2)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n")
    table = Table(title=f"{document['model']['name']}, {document['engine']['dtype']}")
    for column in document["ways"][0]:
        table.add_column(column.replace("_", " "))
    for way in document["ways"]:
        table.add_row(*map(str, way.values()))
    Console(stderr=True).print(table)
    Console(stderr=True).print(
        f"{document['compared']} requests compared, {document['differences']} differences"
    )
    if document["differences"]:
        raise typer.Exit(1)


app.command()(chaos)
app.command()(quality)
