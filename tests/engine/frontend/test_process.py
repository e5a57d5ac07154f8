"""Starting the engine's process, and the supervisor of one that dies as the test says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import EngineStartError
from engine.frontend.process import HEALTHY_SECONDS, MAX_BACK_OFF_SECONDS, EngineProcess, Supervisor


def test_a_socket_path_that_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(EngineStartError, match="more than 107 bytes; let TMPDIR name a shorter"):
        EngineProcess(EngineConfig(model_dir="."))


def test_no_folder_for_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(EngineStartError, match="no folder for the engine's socket"):
        EngineProcess(EngineConfig(model_dir="."))


class Mortal(EngineProcess):
    """No process at all."""

    def __init__(self) -> None:
        self.starts = 0
        self.status: int | None = None

    def start(self) -> None:
        self.starts += 1
        self.status = None

    def exit_status(self) -> int | None:
        return self.status


class Played:
    """A supervised process and the time."""

    def __init__(self, max_restarts: int) -> None:
        self.now = 0.0
        self.process = Mortal()
        self.supervisor = Supervisor(self.process, max_restarts, lambda: self.now)

    def die(self) -> float | None:
        """Seconds until it was started again, None where it was not."""
        self.process.status = -9
        died, starts = self.now, self.process.starts
        while self.process.starts == starts:
            if self.supervisor.poll() is not None:
                return None
            self.now += 0.05
        return round(self.now - died, 1)


def test_restarts_come_ever_later_and_end() -> None:
    played = Played(4)
    assert played.supervisor.poll() is None
    delays = [played.die() for _ in range(4)]
    for delay, expected in zip(delays, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert delay is not None
        assert expected <= delay < expected + 0.11
    assert played.die() is None
    assert played.process.starts == 4
    assert played.supervisor.poll() == -9


def test_restarts_never_wait_for_long() -> None:
    played = Played(40)
    delays = [played.die() for _ in range(40)]
    assert all(delay is not None and delay <= MAX_BACK_OFF_SECONDS + 0.1 for delay in delays)


def test_a_long_life_forgives() -> None:
    played = Played(1)
    for _ in range(3):
        assert played.die() is not None
        played.now += HEALTHY_SECONDS + 1
    assert played.die() is not None
    assert played.die() is None


def test_no_restarts() -> None:
    assert Played(0).die() is None
