"""What a text costs a model when its context shifts, beside a context that is computed anew."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine import LLM, RequestOptions
from engine.config import CacheConfig, DType, Quantize
from engine.errors import InvalidRequest
from engine.request import SINK_BLOCKS, Window
from loadtest.bench.options import DEFAULT_MODEL, Json, Model, Threads
from loadtest.report import write

SHIFT = RequestOptions(overflow="shift")
WITHIN = 0.05
"""How much a shifting context may cost: the share that perplexity is above that of windows
computed anew."""

SAMPLE = DEFAULT_MODEL.parent / "sample.txt"
BATCH = 8


@dataclass(frozen=True)
class Method:
    """One way to see the tokens behind the first context. above: perplexity over that of `anew`."""

    name: str
    tokens: int
    nats_per_token: float
    perplexity: float
    above: float
    seconds: float


def windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): tokens first .. end - 1 are scored with begin .. before them.

    Together they are all tokens behind the first `length` ones. The last row that a window computes
    sees `length` tokens, itself included, and the first one `stride - 1` fewer: with a stride of a
    page, on pages' boundaries, exactly as many as a shifting request sees.
    """
    for first in range(length + 1, num_tokens, stride):
        end = min(first + stride, num_tokens)
        yield first - 1 + stride - length, first, end


def scored_anew(
    llm: LLM, token_ids: list[int], length: int, stride: int, progress: Callable[[int], None]
) -> list[float]:
    """Log-probabilities of the tokens behind the first `length`, each window computed anew."""
    logprobs = []
    todo = list(windows(len(token_ids), length, stride))
    for at in range(0, len(todo), BATCH):
        batch = todo[at : at + BATCH]
        texts: list[str | list[int]] = [token_ids[begin:end] for begin, _, end in batch]
        # A window's beginning is no other's, but for a short last stride: first differs there too.
        for (begin, first, _), score in zip(
            batch, llm.score(texts, first=length - stride + 1), strict=True
        ):
            assert begin + score.first == first
            logprobs += [each.logprob for each in score.logprobs]
        progress(len(batch))
    return logprobs


def compare(
    llm: LLM,
    text: str,
    sinks: Sequence[int],
    stride: int | None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a text with windows computed anew, and with a cache that shifts, by pages kept.

    stride: tokens by which a window moves; None: a page. progress: called with shares of the work.
    Raises InvalidRequest where the text does not outgrow the context by a page.
    """
    size, limit = llm.info.block_size, llm.info.max_position
    num_blocks = limit // size
    length = num_blocks * size
    stride = size if stride is None else stride
    token_ids = llm.tokenizer.encode(text)
    if len(token_ids) <= length + size:
        raise InvalidRequest(
            f"text must have more than {length + size} tokens (the context and a page), "
            f"got {len(token_ids)}",
            "text",
        )
    if not 1 <= stride <= length:
        raise InvalidRequest(f"stride must be 1 to {length}, got {stride}", "stride")
    count = -(-(len(token_ids) - length - 1) // stride)
    methods: list[Method] = []

    def note(name: str, logprobs: Sequence[float], began: float) -> None:
        assert len(logprobs) == len(token_ids) - length - 1
        nats = -math.fsum(logprobs) / len(logprobs)
        anew = methods[0].nats_per_token if methods else nats
        seconds = round(time.perf_counter() - began, 2)
        methods.append(
            Method(
                name,
                len(logprobs),
                round(nats, 5),
                round(math.exp(nats), 4),
                round(math.expm1(nats - anew), 5),
                seconds,
            )
        )

    began = time.perf_counter()
    anew = scored_anew(llm, token_ids, length, stride, lambda done: progress(done / count))
    note("anew", anew, began)
    for kept in sinks:
        began = time.perf_counter()
        window = Window(size, num_blocks, kept)
        (score,) = llm.score([token_ids], SHIFT, window=window)
        shifted = [each.logprob for each in score.logprobs[length:]]
        note(f"shift, sinks {kept}", shifted, began)
        progress(1.0)
    info = llm.info
    return {
        "model": {"name": info.model, "parameters": info.num_parameters},
        "engine": {"dtype": info.dtype, "device": info.device, "attention": info.attention}
        | {"products": info.products},
        "tokens": len(token_ids),
        "contexts": round(len(token_ids) / limit, 1),
        "window_tokens": length,
        "page_tokens": size,
        "stride_tokens": stride,
        "methods": [asdict(method) for method in methods],
    }


def quality(
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[DType, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[
        Quantize, typer.Option(help="int8: what quantized weights cost; compare with none.")
    ] = "none",
    threads: Threads = None,
    text: Annotated[
        Path,
        typer.Option(
            help="UTF-8 text that outgrows the context.",
            show_default="a sample",
            exists=True,
            dir_okay=False,
        ),
    ] = SAMPLE,
    block_size: Annotated[
        int, typer.Option(help="Tokens in a page of the cache: 16, 32 or 64.")
    ] = CacheConfig().block_size,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens by which a window computed anew moves.", show_default="a page"),
    ] = None,
    sinks: Annotated[
        str, typer.Option(help="Pages at the beginning that shifting keeps, by commas.")
    ] = f"{SINK_BLOCKS},0",
    json_file: Json = None,
) -> None:
    """Perplexity of a text behind its first context: `overflow: shift` beside windows of the same
    size that are computed anew, and beside plain windowing without sinks.

    Exits with 1 if the first shift of the list costs more than 5 %.
    """
    try:
        kept = [int(each) for each in sinks.split(",")]
    except ValueError:
        kept = [-1]
    llm = LLM(
        model,
        dtype=dtype,
        quantize=quantize,
        threads=threads,
        max_num_seqs=BATCH,
        block_size=block_size,
    )
    num_blocks = llm.info.max_position // block_size
    most = num_blocks - 2
    if most < SINK_BLOCKS:
        raise typer.BadParameter(
            f"--block-size {block_size}: a context of {llm.info.max_position} tokens has "
            f"{num_blocks} pages; shifting needs {SINK_BLOCKS + 2}"
        )
    if not all(0 <= each <= most for each in kept):
        raise typer.BadParameter(f"--sinks must be numbers from 0 to {most}, got {sinks!r}")
    try:
        content = text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"--text {text} is not UTF-8: {error}") from error
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("scoring", total=1.0 + len(kept))
        document = compare(llm, content, kept, stride, lambda done: bar.advance(task, done))
    document = {"command": "quality", "text": text.name, **document}
    write(document, json_file)
    table = Table(
        title=f"{document['model']['name']}, {document['engine']['products']}: {text.name}, "
        f"{document['tokens']} tokens, window {document['window_tokens']}"
    )
    for column in ("context", "tokens", "nats per token", "perplexity", "above anew", "seconds"):
        table.add_column(column, justify="left" if column == "context" else "right")
    for row in document["methods"]:
        cells = [str(value) for value in row.values()]
        cells[4] = f"{100 * row['above']:+.2f} %"
        table.add_row(*cells)
    console.print(table)
    if document["methods"][1]["above"] > WITHIN:
        raise typer.Exit(1)
