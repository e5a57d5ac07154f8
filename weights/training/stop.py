"""Ctrl-C, or a TERM, asks a run to stop when its step is done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object] | int | None
"""What stands for a signal; None where no Python code set it."""


class Stop:
    """While it is entered, `asked` is the signal that came, if any.

    hurried: whether a second Ctrl-C ends the process at once. Not so under torchrun, which repeats
    what the terminal has told every process already.
    """

    def __init__(self, *, hurried: bool) -> None:
        self.hurried = hurried
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Stop:
        for each in (signal.SIGINT, signal.SIGTERM):
            self._before[each] = signal.signal(each, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT and self.hurried:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
