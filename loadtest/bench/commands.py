"""`ropeway bench`: figures that anyone can reproduce, beside what the machine could do at best."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.config import DType
from engine.grammar import INSTALLED
from engine.model.loader import read_config
from loadtest.bench import grammars, waiting
from loadtest.bench import http as http_process
from loadtest.bench import prefill as prompts
from loadtest.bench import serve as serving
from loadtest.bench import startup as starting
from loadtest.bench import streams as running
from loadtest.bench.chaos import chaos
from loadtest.bench.determinism import Load, compare
from loadtest.bench.options import (
    DEFAULT_MODEL,
    Dtype,
    Http,
    Json,
    Model,
    Output,
    Prompt,
    Repeats,
    Streams,
    Threads,
    counts,
    queue_lengths,
)
from loadtest.bench.quality import quality
from loadtest.errors import Unmeasurable
from loadtest.report import report
from loadtest.workload import Workload

app = typer.Typer(
    help="Measure latency, throughput and more on this machine, as JSON and as a table.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@contextmanager
def measuring(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of so many steps; what cannot be measured ends the command with status 1."""
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=total)
            yield lambda: progress.advance(task)
    except Unmeasurable as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from error


def _streams(
    command: str,
    model: Path,
    dtype: DType,
    threads: int | None,
    shape: tuple[int, int],
    repeats: int,
    http: bool,
    streams: Sequence[int],
    json_file: Path | None,
) -> None:
    size = read_config(model).vocab_size
    workloads = [Workload(count, *shape, size) for count in streams]
    with measuring(len(workloads) * (repeats + 1)) as progress:
        content = running.measure(
            command, model, dtype, threads, workloads, repeats, http, progress
        )
    report(content, running.COLUMNS, json_file)


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
    shape = (prompt_tokens, output_tokens)
    _streams("latency", model, dtype, threads, shape, repeats, http, [1], json_file)


@app.command()
def throughput(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    prompt_tokens: Prompt = 128,
    output_tokens: Output = 128,
    repeats: Repeats = 3,
    http: Http = True,
    streams: Streams = "1,8,16,32",
    json_file: Json = None,
) -> None:
    """Several streams at once: tokens a second of all together."""
    shape = (prompt_tokens, output_tokens)
    _streams("throughput", model, dtype, threads, shape, repeats, http, streams, json_file)


@app.command()
def prefill(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    prompt_tokens: Annotated[
        Any, typer.Option(parser=counts, metavar="N,N,...", help="Tokens of a prompt, by commas.")
    ] = "128,512",
    repeats: Repeats = 7,
    json_file: Json = None,
) -> None:
    """Prompts alone, in this process: tokens a second until the first new one."""
    with measuring(repeats + 1) as progress:
        content = prompts.measure(model, dtype, threads, prompt_tokens, repeats, progress)
    report(content, prompts.COLUMNS, json_file)


@app.command()
def serve(
    url: Annotated[
        str | None,
        typer.Option(help="A server of that model that runs already; else one is started."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    streams: Streams = "1,8,16,32",
    prompt_tokens: Prompt = 128,
    output_tokens: Output = 128,
    arrival_tokens: Annotated[
        int,
        typer.Option(help="Tokens of the prompt that arrives; at most the context allows.", min=1),
    ] = 1000,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Clients of a server: first tokens, gaps, tokens a second; a long prompt arrives; memory."""
    shape = (prompt_tokens, output_tokens)
    with measuring(repeats + 1) as progress:
        content = serving.measure(
            model, dtype, threads, url, streams, shape, arrival_tokens, repeats, progress
        )
    report(content, serving.COLUMNS, json_file)
    if memory := content.get("memory"):
        Console(stderr=True).print(
            "memory: weights {weight_bytes:,} + cache {cache_bytes:,} + {others_bytes:,} bytes"
            " = {peak_bytes:,} at most".format(**memory),
            highlight=False,
        )


@app.command()
def queue(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    streams: Annotated[int, typer.Option(help="Streams that run.", min=1)] = 32,
    waiting_requests: Annotated[
        Any,
        typer.Option(
            "--waiting", parser=queue_lengths, metavar="N,N,...", help="Requests that wait."
        ),
    ] = "0,100,1000",
    prompt_tokens: Prompt = 16,
    output_tokens: Output = 768,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Whether the streams that run are slowed by the requests that wait."""
    shape = (prompt_tokens, output_tokens)
    with measuring(repeats + 1) as progress:
        content = waiting.measure(
            model, dtype, threads, streams, waiting_requests, shape, repeats, progress
        )
    report(content, waiting.COLUMNS, json_file)


@app.command()
def grammar(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    streams: Streams = "1,8,32",
    output_tokens: Output = 128,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """What a step costs where outputs must obey a JSON schema or a regular expression."""
    if not INSTALLED:
        raise typer.BadParameter("llguidance is not installed: pip install 'ropeway[grammar]'")
    with measuring(len(streams) * (repeats + 1)) as progress:
        content = grammars.measure(model, dtype, threads, streams, output_tokens, repeats, progress)
    report(content, grammars.COLUMNS, json_file)


@app.command()
def startup(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Threads = None,
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """From the command to a server that is ready, and to its first token."""
    with measuring(repeats) as progress:
        content = starting.measure(model, dtype, threads, repeats, progress)
    report(content, starting.COLUMNS, json_file)


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
app.command("http")(http_process.measure)
