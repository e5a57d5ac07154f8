"""`python -m loadtest.compare`: ours and other engines on the same weights, in turns in one run.

The model leaves as a GPT-NeoX directory (`ropeway convert --to gpt-neox`), which Hugging Face and
vLLM read, and from there as GGUF for llama.cpp. All have the same number of threads, random prompts
that nobody has cached, greedy decoding, and a run of each kind that warms up and does not count. In
each repeat another one begins. A ratio is ours over theirs within a repeat.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from engine.config import Quantize
from engine.errors import RopewayError
from loadtest.bench.options import DEFAULT_MODEL, counts
from loadtest.client import run_http
from loadtest.errors import Unmeasurable
from loadtest.figures import ranged, spread
from loadtest.gguf import KINDS
from loadtest.machine import Machine
from loadtest.others import Others, doubt
from loadtest.peers.base import Absent, Offline, Reached, Serving, rotated
from loadtest.peers.lineup import (
    Comparison,
    PeerName,
    Tools,
    offline_peers,
    serving_peers,
    write_files,
)
from loadtest.report import Column, document, report
from loadtest.roofline import Sizes

What = Literal["decode", "prefill", "http"]
Choice = TypeVar("Choice", bound=str)
IDLE_SECONDS = 1.0
COLUMNS: Sequence[Column] = (
    ("", lambda row: row["what"]),
    ("streams", lambda row: str(row["streams"])),
    ("engine", lambda row: row["engine"]),
    ("tokens/s", lambda row: ranged(row["tokens_per_s"])),
    ("first token ms", lambda row: ranged(row.get("first_token_ms"))),
    ("ours is faster by", lambda row: ranged(row.get("ratio"))),
)


def compare_offline(
    each: Comparison,
    sizes: Sizes,
    peers: Sequence[Offline],
    what: Sequence[What],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Decoding at every number of streams, and a prompt alone, as far as `what` asks for them."""
    rates: dict[tuple[str, int], dict[str, list[float]]] = {}
    workloads = [each.workload(count, sizes.vocab_size) for count in each.streams]
    steps = [*workloads] * ("decode" in what) + [None] * ("prefill" in what)
    task = progress.add_task("offline", total=(each.repeats + 1) * len(steps) * len(peers))
    for repeat in range(each.repeats + 1):
        for step in steps:
            for peer in rotated(peers, repeat):
                if step is None:
                    kind, streams = "prefill", 1
                    rate = peer.prefill(each.prefill_tokens, repeat)
                else:
                    kind, streams = "decode", step.streams
                    rate = peer.run(step, repeat).decode_tokens_per_s
                if repeat and rate is not None:  # the first run warms up
                    by_peer = rates.setdefault((kind, streams), {p.name: [] for p in peers})
                    by_peer[peer.name].append(rate)
                    progress.print(f"{kind} {streams} {peer.name}: {rate:.1f} tokens/s")
                progress.advance(task)
    return [
        row
        for (kind, streams), by_peer in rates.items()
        for row in _rows(kind, streams, by_peer, {})
    ]


def compare_http(
    each: Comparison,
    sizes: Sizes,
    peers: Sequence[Serving],
    progress: Progress,
    measured_all: Callable[[], None],
) -> list[dict[str, Any]]:
    """All servers are there all the time, and paused but for the one that works. measured_all:
    called before they end."""
    rates: dict[int, dict[str, list[float]]] = {
        count: {peer.name: [] for peer in peers} for count in each.streams
    }
    firsts: dict[int, dict[str, list[float]]] = {
        count: {peer.name: [] for peer in peers} for count in each.streams
    }
    task = progress.add_task("http", total=(each.repeats + 1) * len(each.streams) * len(peers))
    with ExitStack() as stack:
        reached: list[tuple[str, Reached]] = []
        for peer in peers:
            reached.append((peer.name, stack.enter_context(peer.serve())))
            server = reached[-1][1].server
            stack.callback(server.resume)  # else it could not end
            server.pause()
        for repeat in range(each.repeats + 1):
            for streams in each.streams:
                workload = each.workload(streams, sizes.vocab_size)
                for name, one in rotated(reached, repeat):
                    one.server.resume()
                    run = run_http(one.server.url, workload, repeat, one.dialect)
                    measured = asyncio.run(run)
                    one.server.pause()
                    if repeat:  # the first run warms up
                        rates[streams][name].append(measured.tokens_per_s)
                        first = statistics.median(measured.first_token_s)
                        firsts[streams][name].append(1000 * first)
                        progress.print(
                            f"http {streams} {name}: {measured.tokens_per_s:.1f} tokens/s"
                        )
                    progress.advance(task)
        measured_all()
    return [
        row
        for streams in each.streams
        for row in _rows("http", streams, rates[streams], firsts[streams])
    ]


def _rows(
    what: str, streams: int, rates: dict[str, list[float]], firsts: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """One for each engine that could be measured; ours is the first."""
    ours = next(iter(rates.values()))
    rows = []
    for name, each in rates.items():
        if not each:
            continue
        row: dict[str, Any] = {"what": what, "streams": streams, "engine": name}
        row["tokens_per_s"] = spread(each)
        if name in firsts:
            row["first_token_ms"] = spread(firsts[name])
        if each is not ours:
            ratios = [mine / theirs for mine, theirs in zip(ours, each, strict=True)]
            row["ratio"] = spread(ratios, 2)
        rows.append(row)
    return rows


def compare(each: Comparison, what: Sequence[What], tools: Tools) -> dict[str, Any]:
    """Measure all that was asked for. Raises RopewayError."""
    sizes = Sizes.of(each.model, each.dtype)
    longest = max(each.context - 1, each.prefill_tokens)
    if longest > sizes.max_position:
        raise Unmeasurable(f"{longest} tokens do not fit a context of {sizes.max_position}")
    others = Others()
    machine = Machine.measure(each.threads)
    results: list[dict[str, Any]] = []
    absent: list[Absent] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        files = write_files(each.model, each.kinds, Path(folder))
        if "decode" in what or "prefill" in what:
            offline, missing = offline_peers(each, sizes, files, tools)
            absent += missing
            results += compare_offline(each, sizes, offline, what, progress)
        if "http" in what:
            serving, missing = serving_peers(each, files, tools)
            absent += missing
            results += compare_http(each, sizes, serving, progress, others.stop)
    return document(
        "compare",
        {"name": each.model.name, "parameters": sizes.parameters, "dtype": sizes.dtype},
        machine,
        others,
        results,
        absent=[asdict(one) for one in absent],
        quantize=each.quantize,
        repeats=each.repeats,
        prompt_tokens=each.prompt_tokens,
        output_tokens=each.output_tokens,
        prefill_tokens=each.prefill_tokens,
    )


def some_of(known: Sequence[Choice]) -> Callable[[str], list[Choice]]:
    """A parser of names by commas; it raises typer.BadParameter for one that is not known."""
    by_name = {str(each): each for each in known}

    def parse(text: str) -> list[Choice]:
        parts = text.split(",")
        if unknown := [part for part in parts if part not in by_name]:
            raise typer.BadParameter(f"knows {', '.join(by_name)}, not {unknown[0]!r}")
        return [by_name[part] for part in parts]

    return parse


def _found(name: str) -> Path | None:
    where = shutil.which(name)
    return None if where is None else Path(where)


Executable = typer.Option(exists=True, dir_okay=False, help="Default: the one on PATH.")


def main(
    model: Annotated[Path, typer.Option(help="Model directory.")] = DEFAULT_MODEL,
    what: Annotated[
        Any,
        typer.Option(
            parser=some_of(get_args(What)), metavar="NAME,...", help="Of decode, prefill, http."
        ),
    ] = "decode,prefill,http",
    peers: Annotated[
        Any,
        typer.Option(
            parser=some_of(get_args(PeerName)),
            metavar="NAME,...",
            help="Of llama.cpp, transformers, vllm: with whom.",
        ),
    ] = "llama.cpp,transformers,vllm",
    streams: Annotated[Any, typer.Option(parser=counts, metavar="N,N,...")] = "1,8,16,32",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Ours, transformers' and vLLM's.")
    ] = "bfloat16",
    quantize: Annotated[Quantize, typer.Option(help="Ours.")] = "none",
    llama: Annotated[
        Any,
        typer.Option(
            parser=some_of(KINDS), metavar="NAME,...", help="Of f32, bf16, q8_0: llama.cpp's."
        ),
    ] = "bf16",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=2)] = 128,
    prefill_tokens: Annotated[int, typer.Option(help="Of the prompt alone.", min=1)] = 512,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[
        int | None, typer.Option(help="Of every engine.", min=1, show_default="one per core")
    ] = None,
    llama_batched_bench: Annotated[Path | None, Executable] = None,
    llama_server: Annotated[Path | None, Executable] = None,
    vllm: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The `vllm` command.")
    ] = None,
    busy: Annotated[bool, typer.Option(help="Measure although others use the machine.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write JSON here too.")] = None,
) -> None:
    """Compare with llama.cpp, transformers and vLLM, as far as they are there."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # paused servers would be left
    others = Others()
    time.sleep(IDLE_SECONDS)  # so that only others are seen
    warning = doubt(others.document())
    if warning and not busy:
        console.print(f"error: {warning}; or pass --busy", style="red", highlight=False)
        raise typer.Exit(1)
    tools = Tools(
        llama_batched_bench or _found("llama-batched-bench"),
        llama_server or _found("llama-server"),
        vllm,
    )
    each = Comparison(
        model=model,
        dtype=dtype,
        quantize=quantize,
        peers=peers,
        kinds=llama,
        streams=streams,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tokens=prefill_tokens,
        repeats=repeats,
        threads=threads or os.cpu_count() or 1,
    )
    try:
        content = compare(each, what, tools)
    except RopewayError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error
    report(content, COLUMNS, json_file)
    for one in content["absent"]:
        console.print(f"absent: {one['name']} ({one['why']})", highlight=False)


if __name__ == "__main__":
    typer.run(main)
