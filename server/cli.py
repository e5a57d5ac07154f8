"""The command line: the composition root, and the only file that reads the environment."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.frontend.process import EngineProcess
from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineReady
from server.access.keys import KeyRing, new_key
from server.chat import ChatTemplate
from server.prefixes import read_prefix
from server.processes.listener import check_certificate, listen_all
from server.processes.running import run
from server.settings import LogFormat, LogLevel, ServerSettings
from server.terminal import offline
from server.terminal.options import (
    DeviceOption,
    DTypeOption,
    KvMemoryOption,
    QuantizeOption,
    SetOption,
    TextOption,
    ThreadsOption,
    model_directory,
    option,
    size_option,
)
from server.terminal.outcome import FAILED, UNDECIDED, extra, fail, reported
from server.terminal.panel import show
from server.terminal.sizes import format_size

SCHEDULER = SchedulerConfig()
SERVER = ServerSettings()

app = typer.Typer(
    name="ropeway",
    help="Serve GPT-2-family models that were trained with rotary position embeddings.",
    epilog="Options can be set by environment variables: ROPEWAY_SERVE_PORT is `serve --port`.",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "ROPEWAY", "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The `ropeway` command."""
    app()


def cache_directory() -> Path:
    """Where conversions are kept: with what other programs can make anew."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError as error:
        fail(f"no directory for conversions: {error}; name one (--cache-dir)", FAILED)
    return Path(home) / "ropeway"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, option("--version", help="Show the version.")] = False,
) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(f"ropeway {package_version()}")
        raise typer.Exit


def package_version() -> str:
    """Of the installed distribution."""
    return metadata.version("ropeway")


@app.command()
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            show_envvar=False,
            help="Model directory, or a checkpoint of a known format.",
            show_default="the shipped",
        ),
    ] = None,
    *,
    host: Annotated[str, option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(min=0, max=65535, help="0: any that is free.")] = 8000,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    kv_memory: KvMemoryOption = None,
    max_num_seqs: Annotated[
        int, option(help="Requests that run at once.")
    ] = SCHEDULER.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, option(help="Tokens in one step, of prompts and outputs together.")
    ] = SCHEDULER.max_num_batched_tokens,
    max_profiles: Annotated[
        int,
        option(help="Rotations in force at once (a request's `rope`), with the model's own."),
    ] = SCHEDULER.max_profiles,
    max_queue: Annotated[
        int, option(min=0, help="Requests that may wait; beyond them the answer is 429.")
    ] = SERVER.max_queue,
    threads: ThreadsOption = None,
    block_size: Annotated[
        int, option(help="Tokens in a page of the cache: 16, 32 or 64.")
    ] = CacheConfig().block_size,
    api_workers: Annotated[int, option(min=1, help="HTTP processes on the one port.")] = 1,
    drain_timeout: Annotated[
        float, option(min=0, help="Seconds that running streams get once told to stop.")
    ] = SERVER.drain_seconds,
    max_restarts: Annotated[
        int, option(min=0, help="Restarts in a row of an engine process that died.")
    ] = SERVER.max_restarts,
    max_body: Annotated[
        int | None,
        option(
            parser=size_option,
            metavar="SIZE",
            help="The largest body of a request.",
            show_default=format_size(SERVER.max_body_bytes),
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, option(metavar="FILE", help="Whose keys are let in; see `ropeway key`.")
    ] = None,
    share_prefix_cache: Annotated[
        bool, option("--share-prefix-cache", help="Cached prompts serve all keys, not only one.")
    ] = False,
    shared_prefix_file: Annotated[
        list[Path] | None,
        option(
            metavar="FILE",
            help="A text that prompts begin with and all keys share, or, in a .json file, the "
            "messages that conversations begin with; may be repeated.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, option(help="Origin of pages that may ask; may be repeated.")
    ] = None,
    ssl_certfile: Annotated[
        Path | None, option(metavar="FILE", help="Certificate chain, for HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, option(metavar="FILE", help="And its key.")] = None,
    log_format: Annotated[LogFormat, option(help="Of the log on standard error.")] = "text",
    log_level: Annotated[LogLevel, option(help="info: a line for every request.")] = "warning",
    log_prompts: Annotated[
        bool, option("--log-prompts", help="With what was asked; otherwise the log never has it.")
    ] = False,
    resume_window: Annotated[
        float, option(min=0, help="Seconds that a stream waits for a client that was lost.")
    ] = SERVER.resume_window,
    otlp_endpoint: Annotated[
        str | None, option(metavar="URL", help="Send traces there by OTLP over HTTP (extra: otel).")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        option(
            metavar="DIR",
            help="Where a converted checkpoint is kept for the next start.",
            show_default="~/.cache/ropeway",
        ),
    ] = None,
    text: TextOption = None,
    declare: SetOption = None,
) -> None:
    """Serve a model over HTTP: POST /generate streams tokens, /docs says the rest.

    A checkpoint that is no model directory is converted first, and kept.
    """
    from weights.cache import Wanted, servable  # noqa: PLC0415  # of this command alone

    began = time.monotonic()
    with reported():
        wanted = Wanted(model or model_directory(None), text, declare or ())
        directory = servable(wanted, cache_dir or cache_directory(), Console(stderr=True))
        tokenizer = Tokenizer.from_directory(directory)
        chat = ChatTemplate.from_directory(directory, tokenizer)
        prefixes = tuple(read_prefix(path, tokenizer, chat) for path in shared_prefix_file or ())
        config = EngineConfig(
            model_dir=str(directory),
            device=device,
            dtype=dtype,
            quantize=quantize,
            threads=threads,
            cache=CacheConfig(block_size=block_size, kv_memory=kv_memory, shared_prefixes=prefixes),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_profiles=max_profiles,
            ),
            num_token_ids=len(tokenizer),
            unused_token_ids=tuple(tokenizer.unused_ids),
        )
        check_certificate(ssl_certfile, ssl_keyfile)
        if api_key_file is not None:
            KeyRing.from_file(api_key_file)
    settings = ServerSettings(
        max_queue=max_queue,
        num_workers=api_workers,
        drain_seconds=drain_timeout,
        max_restarts=max_restarts,
        max_body_bytes=SERVER.max_body_bytes if max_body is None else max_body,
        api_key_file=None if api_key_file is None else str(api_key_file),
        share_prefix_cache=share_prefix_cache,
        cors_origins=tuple(cors_origin or ()),
        ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
        ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
        log_format=log_format,
        log_level=log_level,
        log_prompts=log_prompts,
        otlp_endpoint=otlp_endpoint,
        resume_window=resume_window,
    )
    if otlp_endpoint is not None:
        with extra("otel"):
            import server.middleware.tracing  # noqa: F401, PLC0415  # is the extra installed?
    listener, *others = listen_all(host, port, api_workers)
    bound_port = listener.getsockname()[1]

    def announce(ready: EngineReady) -> None:
        secure, keys = ssl_certfile is not None, api_key_file is not None
        seconds = time.monotonic() - began
        show(
            Console(),
            ready,
            host,
            bound_port,
            seconds,
            secure=secure,
            keys=keys,
            prefixes=prefixes,
        )

    with reported():
        process = EngineProcess(config)
    if others:
        settings = replace(settings, shared_dir=str(process.folder))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(process.folder)  # as metrics.py says
    run(process, directory, tokenizer, chat, [listener, *others], settings, announce)


app.command()(offline.generate)
app.command()(offline.chat)


@app.command()
def key(
    name: Annotated[str, typer.Argument(show_envvar=False, help="Whose key it will be.")],
    *,
    rate: Annotated[int | None, option(min=1, help="Requests a minute.")] = None,
    concurrency: Annotated[int | None, option(min=1, help="Requests at once.")] = None,
) -> None:
    """Make an API key: its line for --api-key-file, and on standard error the key itself."""
    with reported():
        secret, made = new_key(name, rate, concurrency)
    typer.echo(made.line)
    typer.echo(f"the key of {name}, which is shown only now: {secret}", err=True)


FORWARD = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Of commands that hand all their arguments on."""


@app.command(context_settings=FORWARD)
def bench(context: typer.Context) -> None:
    """Measure latency and throughput on this machine, offline and over HTTP."""
    with extra("bench"), reported():
        from loadtest.bench.commands import app as bench_app  # noqa: PLC0415  # loads PyTorch

        bench_app(context.args, prog_name="ropeway bench")


@app.command(context_settings=FORWARD)
def loadtest(context: typer.Context) -> None:
    """Load a server as chatting readers do, find its knee, and leave a report."""
    with extra("loadtest"), reported():
        from loadtest.load.run import app as loadtest_app  # noqa: PLC0415  # of an extra

        loadtest_app(
            context.args, prog_name="ropeway loadtest", auto_envvar_prefix="ROPEWAY_LOADTEST"
        )


@app.command(context_settings=FORWARD)
def train(context: typer.Context) -> None:
    """Train a model of this family on a folder of text, as the shipped one was."""
    with extra("train"), reported():
        from weights.train_command import app as train_app  # noqa: PLC0415  # loads PyTorch

        train_app(context.args, prog_name="ropeway train")


SourceArgument = Annotated[
    Path, typer.Argument(metavar="SRC", show_envvar=False, help="A checkpoint: file or directory.")
]


@app.command()
def convert(
    source: SourceArgument,
    destination: Annotated[
        Path, typer.Argument(metavar="DST", show_envvar=False, help="A new directory.")
    ],
    *,
    to: Annotated[
        Literal["ropeway", "gpt-neox"], option(help="gpt-neox: for Hugging Face to load.")
    ] = "ropeway",
    text: TextOption = None,
    declare: SetOption = None,
) -> None:
    """Turn a checkpoint into a model directory; what its files leave open, a text tells."""
    from weights import commands  # noqa: PLC0415  # loads PyTorch

    with reported():
        commands.convert(source, destination, to, text, declare or [])


@app.command()
def inspect(source: SourceArgument, *, text: TextOption = None, declare: SetOption = None) -> None:
    """Show what a checkpoint says of itself, what it leaves open, and what a text tells of that.

    The exit code is 3 where something is open and the text does not tell.
    """
    from weights import commands  # noqa: PLC0415  # loads PyTorch

    with reported():
        if not commands.inspect(source, text, declare or []):
            raise typer.Exit(UNDECIDED)


if __name__ == "__main__":
    main()
