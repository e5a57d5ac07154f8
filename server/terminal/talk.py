"""`ropeway chat`: a conversation at the terminal, or one turn for each line of standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from threading import Event
from types import FrameType

import typer

from engine.errors import RequestError
from server.terminal.conversation import Conversation

with suppress(ImportError):  # where there is none, input() has no history
    import readline  # noqa: F401  # importing it is what helps

HELP = "/reset forgets the conversation. Ctrl-C stops an answer, Ctrl-D leaves."


def talk(conversation: Conversation) -> None:
    """Answer what is typed, or what is piped in. Raises RequestError for a line of the latter."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _each(conversation, sys.stdin, Event())
        return
    typer.echo(HELP, err=True)
    for line in _typed():
        try:
            with _interruptible() as interrupted:
                _each(conversation, [line], interrupted)
        except RequestError as error:
            typer.echo(f"error: {error}", err=True)


def _typed() -> Iterator[str]:
    """Lines until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D leaves.", err=True)


def _each(conversation: Conversation, lines: Iterable[str], interrupted: Event) -> None:
    for line in lines:
        text = line.strip()
        if text.startswith("/"):
            _command(conversation, text)
        elif text:
            _turn(conversation, text, interrupted)


def _command(conversation: Conversation, text: str) -> None:
    if text == "/reset":
        conversation.reset()
        typer.echo("The conversation is forgotten.", err=True)
    elif text == "/help":
        typer.echo(HELP, err=True)
    else:
        typer.echo(f"{text} is no command; there are /reset and /help", err=True)


def _turn(conversation: Conversation, text: str, interrupted: Event) -> None:
    with closing(conversation.answer(text)) as pieces:
        for at, piece in enumerate(pieces):
            if at == 0 and conversation.forgotten:
                gone = f"{conversation.forgotten} messages no longer fit and are forgotten"
                typer.echo(f"(the oldest {gone})", err=True)
            typer.echo(piece, nl=False)
            if interrupted.is_set():
                break
    typer.echo()


@contextmanager
def _interruptible() -> Generator[Event, None, None]:
    """Ctrl-C sets the event, so that no step of the engine is torn; a second one interrupts."""
    interrupted = Event()

    def note(_: int, __: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
