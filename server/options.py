"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(*names: str, **settings: Any) -> Any:
    """An option; its environment variable works but would drown its help."""
    return typer.Option(*names, show_envvar=False, **settings)


TemperatureOption = Annotated[float, option(help="0 takes the likeliest token.")]
TopKOption = Annotated[int, option(help="Keep the k likeliest; 0: all.")]
TopPOption = Annotated[float, option(help="Keep the likeliest tokens whose mass reaches p.")]
MinPOption = Annotated[
    float, option(help="Keep tokens at least this much as likely as the likeliest.")
]
RepetitionPenaltyOption = Annotated[float, option(help="Makes tokens that were there less likely.")]
PresencePenaltyOption = Annotated[
    float, option(help="Subtracted once from tokens that the output has.")
]
FrequencyPenaltyOption = Annotated[
    float, option(help="Subtracted for each time that the output has a token.")
]
SeedOption = Annotated[int | None, option(help="Same seed, same text.")]
StopOption = Annotated[list[str] | None, option(help="Text that ends the output; may be repeated.")]
IgnoreEosOption = Annotated[bool, option("--ignore-eos", help="Go on after the model's end token.")]
