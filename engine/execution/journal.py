"""Which requests the running step computes, written where the process's death cannot reach it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

_HEADER_BYTES = 4


class StepJournal:
    """A small file, kept from one life of the engine process to the next.

    It names a step's requests before the step begins and, once it is over, those whose next token
    is being computed already, each with the index of the token that it is computed for. What a
    process finds in it at its start is what its predecessor died of, or with: `suspects` were
    computed together with others or for the first time, `poisoned` is one that was a suspect
    already and was computed alone.
    """

    def __init__(self, path: Path) -> None:
        """Read what the last process left and begin anew."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        alone, computed = self._read()
        self.suspects: dict[str, int] = {} if alone else computed
        self.poisoned: list[str] = list(computed) if alone else []
        self.end()

    def begin(self, computed: Mapping[str, int], *, alone: bool) -> None:
        """A step is about to run. computed: request ids and the next token's index in each one's
        output; alone: it tries one suspect.

        The system keeps what was written when the process dies; no disk is waited for.
        """
        content = msgspec.msgpack.encode((alone, computed))
        os.pwrite(self._file, len(content).to_bytes(_HEADER_BYTES, "little") + content, 0)

    def end(self) -> None:
        """The step is over."""
        os.pwrite(self._file, bytes(_HEADER_BYTES), 0)

    def close(self) -> None:
        """Give the file back; its content stays."""
        os.close(self._file)

    def _read(self) -> tuple[bool, dict[str, int]]:
        size = int.from_bytes(os.pread(self._file, _HEADER_BYTES, 0), "little")
        if size == 0:
            return False, {}
        content = os.pread(self._file, size, _HEADER_BYTES)
        return msgspec.msgpack.decode(content, type=tuple[bool, dict[str, int]])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
