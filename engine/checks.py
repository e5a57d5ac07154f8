"""What settings are checked with: a ConfigError names the field, the limit and the value."""

from __future__ import annotations

import math

from engine.errors import ConfigError


def at_least(name: str, value: int, least: int) -> None:
    """An integer, and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def greater_than(name: str, value: float, bound: float) -> None:
    """A finite number above `bound`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    if not value > bound:
        raise ConfigError(f"{name} must be greater than {bound}, got {value}")


def at_most(name: str, value: float, most: float) -> None:
    """Not above `most`; a number already."""
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the names that there are."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
