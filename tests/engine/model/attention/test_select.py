"""The backend that is chosen, and what is said where it is not the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.model import library
from engine.model.attention import cpu
from engine.model.attention.base import AttentionBackend, KVCache
from engine.model.attention.plain import TorchBackend
from engine.model.attention.select import select_backend
from engine.model.profiles import ProfileTables
from tests.engine.model.attention.steps import attention_config


def chosen(num_heads: int, head_dim: int, device: str = "cpu") -> AttentionBackend:
    config = attention_config(num_heads, head_dim, 16)
    cache = KVCache.allocate(config, 2, 16, torch.float32, device)
    return select_backend(config, ProfileTables(config, 16, device=device), cache)


def test_the_compiled_kernel_is_chosen_and_named() -> None:
    backend = chosen(2, 32)
    assert isinstance(backend, cpu.CPUBackend)
    assert backend.name == f"cpu-{library.supported_variants('attention')[0]}"


def test_torch_serves_where_nothing_was_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    library.load_library.cache_clear()
    try:
        backend = chosen(2, 32)
        assert isinstance(backend, TorchBackend)
        assert "without a C++ compiler" in backend.name
        (tmp_path / "none.so").write_bytes(b"not a library")
        assert "does not load" in chosen(2, 32).name
    finally:
        library.load_library.cache_clear()


def test_torch_serves_shapes_that_the_kernel_does_not() -> None:
    assert "head_dim must be at most 256 for the CPU kernel, got 320" in chosen(1, 320).name


def test_torch_serves_other_devices() -> None:
    assert chosen(1, 32, "meta").name == "torch (the compiled kernel is for the CPU)"
