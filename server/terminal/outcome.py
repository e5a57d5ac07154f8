"""How a command ends: its exit codes, and errors as one line."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from typing import NoReturn

import typer

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, RequestError, RopewayError
from engine.params import SamplingParams
from server.settings import ServerSettings

FAILED, MISUSED, UNDECIDED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes, besides 0."""

CONFIGS = (EngineConfig, CacheConfig, SchedulerConfig, ServerSettings)
OPTIONS = {
    *(field.name for config in CONFIGS for field in fields(config)),
    *SamplingParams.__struct_fields__,
    "shared_prefix_file",
}
"""Settings that are options; errors begin with their names."""


def fail(message: str, status: int) -> NoReturn:
    """One clear line, and the end."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


@contextmanager
def reported() -> Generator[None, None, None]:
    """Turn an error into one line: 2 where an option is at fault, 1 where anything else is."""
    try:
        yield
    except (ConfigError, RequestError) as error:
        name, _, rest = str(error).partition(" ")
        if name in OPTIONS:
            fail(f"--{name.replace('_', '-')} {rest}", MISUSED)
        fail(str(error), MISUSED if isinstance(error, RequestError) else FAILED)
    except RopewayError as error:
        fail(str(error), FAILED)


@contextmanager
def extra(name: str) -> Generator[None, None, None]:
    """A command whose libraries come with an extra: say so where one is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; run: pip install 'ropeway[{name}]'", FAILED)
