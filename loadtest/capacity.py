"""From what `ropeway bench throughput` measured of one replica to how many a load needs.

    ropeway bench throughput --json bench.json
    python -m loadtest.capacity bench.json --rate 40 --prompt-tokens 300 --output-tokens 80

A request takes a share of a replica's time: its prompt's tokens that are not cached, at the cost of
one in a prefill, and its output's, at the cost of one in a decode of so many streams. Both costs
are solved from the measured run of P prompt and O output tokens a stream: O / decode_tokens_per_s
is the time of a stream's decoding, O / tokens_per_s that of the whole. A replica is planned to be
busy for `utilisation` of its time: the rest keeps queues short (M/M/1 at 0.7 holds 2.3 requests).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Measured:
    """One run of the bench; tokens of each stream, tokens/s of all together, milliseconds."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_s: float
    decode_tokens_per_s: float
    gap_ms_p95: float

    @classmethod
    def of(cls, result: dict[str, Any]) -> Measured:
        """A result as the bench's JSON has it. Raises KeyError where a figure is absent."""
        return cls(
            streams=result["streams"],
            prompt_tokens=result["prompt_tokens"],
            output_tokens=result["output_tokens"],
            tokens_per_s=result["tokens_per_s"]["median"],
            decode_tokens_per_s=result["decode_tokens_per_s"]["median"],
            gap_ms_p95=result["gap_ms_p95"]["median"],
        )

    @property
    def decode_s(self) -> float:
        """A replica's seconds for one output token, shared by `streams`."""
        return 1 / self.decode_tokens_per_s

    @property
    def prefill_s(self) -> float:
        """A replica's seconds for one prompt token that is not cached."""
        both = self.output_tokens / self.tokens_per_s - self.output_tokens * self.decode_s
        return max(0.0, both) / self.prompt_tokens


@dataclass(frozen=True)
class Load:
    """Requests a second, with their mean numbers of tokens; cached_share: of their prompts."""

    rate: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float = 0.0


@dataclass(frozen=True)
class Plan:
    """replicas: without spare ones; capacity: requests/s of one that is always busy."""

    replicas: int
    capacity: float
    utilisation: float
    streams: float


def plan(measured: Measured, load: Load, utilisation: float) -> Plan:
    """How many replicas carry a load, each busy for at most `utilisation` of its time.

    streams: those under way on each replica, by Little's law, at the measured pace of a stream.
    """
    fresh = load.prompt_tokens * (1 - load.cached_share)
    seconds = fresh * measured.prefill_s + load.output_tokens * measured.decode_s
    replicas = math.ceil(load.rate * seconds / utilisation - 1e-9)
    each = load.rate / replicas
    pace = measured.streams * measured.decode_s
    return Plan(replicas, 1 / seconds, each * seconds, each * load.output_tokens * pace)


def best(results: Sequence[Measured], itl_ms: float) -> Measured:
    """The most streams whose inter-token gaps keep the bound. Raises ValueError where none do."""
    kept = [each for each in results if each.gap_ms_p95 <= itl_ms]
    if not kept:
        least = min(each.gap_ms_p95 for each in results)
        raise ValueError(f"no run keeps p95 gaps within {itl_ms:g} ms; the least is {least:g} ms")
    return max(kept, key=lambda each: each.streams)


@app.command()
def capacity(
    bench: Annotated[Path, typer.Argument(help="JSON of `ropeway bench throughput`.")],
    *,
    rate: Annotated[float, typer.Option(min=1e-9, help="Requests a second, at the peak.")],
    prompt_tokens: Annotated[float, typer.Option(min=1, help="Of each request, on average.")],
    output_tokens: Annotated[float, typer.Option(min=1, help="Of each request, on average.")],
    cached_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of prompt tokens, found in the prefix cache.")
    ] = 0.0,
    itl_ms: Annotated[float, typer.Option(min=0, help="Bound of 95 % of inter-token gaps.")] = 50.0,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="How busy a replica may be.")
    ] = 0.7,
    spare: Annotated[int, typer.Option(min=0, help="Replicas that may fail at once.")] = 1,
) -> None:
    """How many replicas a load needs."""
    try:
        results = [
            Measured.of(each)
            for each in json.loads(bench.read_text())["results"]
            if each["path"] == "http"
        ]
        if not results:
            raise ValueError("it has no run over HTTP")
        measured = best(results, itl_ms)
    except (OSError, KeyError, ValueError) as error:
        raise typer.BadParameter(f"{bench} cannot be used: {error}") from error
    found = plan(measured, Load(rate, prompt_tokens, output_tokens, cached_share), utilisation)
    typer.echo(
        f"{found.replicas + spare} replicas ({found.replicas} and {spare} spare): each carries "
        f"{found.capacity:.1f} such requests/s at most, with {measured.streams} streams;\n"
        f"with {found.replicas} at work each is busy for {found.utilisation:.0%} of its time, "
        f"with {found.streams:.1f} streams on average"
    )


if __name__ == "__main__":
    app()
