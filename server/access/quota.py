"""How much each API key has used, over all HTTP processes."""

from __future__ import annotations

import fcntl
import mmap
import struct
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from server.access.keys import ApiKey

MINUTE = 60.0
_BUCKET = struct.Struct("dd")
_COUNT = struct.Struct("q")


class Quota:
    """A token bucket and a count of open requests for each key, in memory that the processes share.

    A process counts its open requests in a place of its own, so that those of one that died can be
    told apart: whoever takes its place begins at none.
    """

    def __init__(
        self,
        keys: Sequence[ApiKey],
        path: Path | None = None,
        *,
        worker: int = 0,
        num_workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """path: a file for the processes to share, made where it is absent; None: this is alone.

        clock: seconds, the same in all processes.
        """
        self._keys = keys
        self._worker = worker
        self._num_workers = num_workers
        self._clock = clock
        self._record = _BUCKET.size + num_workers * _COUNT.size
        size = max(1, len(keys)) * self._record
        self._file = None
        if path is None:
            self._memory = mmap.mmap(-1, size)
        else:
            self._file = path.open("a+b")
            with self._locked():
                self._file.truncate(size)  # extends by zeros, or does nothing
            self._memory = mmap.mmap(self._file.fileno(), size)
        for number in range(len(keys)):
            _COUNT.pack_into(self._memory, self._place(number, worker), 0)

    def close(self) -> None:
        """Give memory and file back."""
        self._memory.close()
        if self._file is not None:
            self._file.close()

    def begin(self, number: int) -> tuple[str, str, float] | None:
        """Count a request of a key. None: it may go on, and end() must follow.

        Else the error's code, a message that names limit and value, and seconds until it is worth
        another try.
        """
        key = self._keys[number]
        with self._locked():
            running = self._open(number)
            if key.concurrency is not None and running >= key.concurrency:
                return (
                    "too_many_concurrent_requests",
                    f"the key {key.name} may have {key.concurrency} requests at once, and has "
                    f"{running}",
                    1.0,
                )
            if key.rate is not None and (wait := self._wait(number, key.rate)) > 0:
                return (
                    "rate_limited",
                    f"the key {key.name} may make {key.rate} requests a minute; the next one in "
                    f"{wait:.1f} s",
                    wait,
                )
            self._add(number, 1)
        return None

    def end(self, number: int) -> None:
        """The request is over."""
        with self._locked():
            self._add(number, -1)

    def _wait(self, number: int, rate: int) -> float:
        """Take from the bucket: 0, or the seconds until it holds one again.

        The bucket stores what is missing from it, so that zeros are a full one.
        """
        at = number * self._record
        missing, then = _BUCKET.unpack_from(self._memory, at)
        now = self._clock()
        missing = max(0.0, missing - (now - then) * rate / MINUTE)
        if missing + 1 > rate:
            return float((missing + 1 - rate) * MINUTE / rate)
        _BUCKET.pack_into(self._memory, at, missing + 1, now)
        return 0.0

    def _open(self, number: int) -> int:
        return sum(
            _COUNT.unpack_from(self._memory, self._place(number, worker))[0]
            for worker in range(self._num_workers)
        )

    def _add(self, number: int, change: int) -> None:
        at = self._place(number, self._worker)
        _COUNT.pack_into(self._memory, at, _COUNT.unpack_from(self._memory, at)[0] + change)

    def _place(self, number: int, worker: int) -> int:
        return number * self._record + _BUCKET.size + worker * _COUNT.size

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        """Against the other processes; the system lets go of it where a holder dies."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
