"""What a machine has to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.resources import available_memory


def test_memory_of_a_container(tmp_path: Path) -> None:
    everything = available_memory(tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(everything, rel=0.1)
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4000
