"""A conversion in a process of its own, so that PyTorch and the weights are gone when it ends.

Standard input is a line of JSON, then nothing until the end of file, which means: stop. Standard
output is a line of JSON; progress goes to standard error.
"""

from __future__ import annotations

import _thread
import os
import shutil
import sys
from pathlib import Path
from threading import Thread

import msgspec
from rich.console import Console

from engine.errors import RopewayError
from weights.commands import parse_declarations, read_text
from weights.convert import convert
from weights.summary import Summary

INTERRUPTED = 130


class Job(msgspec.Struct, frozen=True):
    """folder: made for the job, and gone where it fails; the model directory is made in it."""

    source: str
    folder: str
    name: str
    text: str | None
    declared: list[str]


class Outcome(msgspec.Struct, frozen=True):
    """What was done, or why not."""

    summary: Summary | None = None
    error: str = ""


def run(job: Job) -> Outcome:
    """Convert; nothing is left where that fails, or is interrupted."""
    outcome = Outcome()
    try:
        converted = convert(
            Path(job.source),
            Path(job.folder, job.name),
            declared=parse_declarations(job.declared),
            text=read_text(None if job.text is None else Path(job.text)),
            console=Console(stderr=True),
        )
        outcome = Outcome(converted.summary())
    except RopewayError as error:
        outcome = Outcome(error=str(error))
    finally:
        if outcome.summary is None:
            shutil.rmtree(job.folder, ignore_errors=True)
    return outcome


def _stop_at_end() -> None:
    """The one who wants the result is gone when standard input ends."""
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: a buffer's lock would outlive main()
        pass
    _thread.interrupt_main()


def main() -> None:
    """`python -m weights.job`."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    Thread(target=_stop_at_end, daemon=True).start()
    try:
        outcome = run(job)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
