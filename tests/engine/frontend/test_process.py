"""Starting the engine's process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import EngineStartError
from engine.frontend.process import EngineProcess


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
