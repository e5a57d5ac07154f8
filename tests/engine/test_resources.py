"""What a machine has to give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.model.on_cuda import check_capability, prepare_for_cuda
from engine.resources import available_memory, resolve_dtype
from tests.models import random_model, tiny_config


def test_memory_of_a_container(tmp_path: Path) -> None:
    everything = available_memory(tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(everything, rel=0.1)
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4000


def test_a_device_that_is_too_old_for_bfloat16_is_served_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    obstacle = "the Triton kernels need compute capability 8.0, this device has 7.5"
    assert check_capability(cuda) == obstacle
    assert prepare_for_cuda(random_model(tiny_config())) == obstacle
    assert resolve_dtype("auto", cuda) == torch.float32
    assert resolve_dtype("bfloat16", cuda) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert check_capability(cuda) is None
    assert resolve_dtype("auto", cuda) == torch.bfloat16
