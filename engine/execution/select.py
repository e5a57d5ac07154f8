"""Which runner carries out the steps on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import cast

from engine.execution.inputs import InputBatch
from engine.execution.runner import ModelRunner, Runner
from engine.execution.sampler import Sampler
from engine.model.attention.base import AttentionBackend
from engine.model.gpt2 import GPT2


def select_runner(
    model: GPT2,
    backend: AttentionBackend,
    sampler: Sampler,
    batch: InputBatch,
    unused_token_ids: Sequence[int],
) -> Runner:
    """One with graphs where attention is Triton's, since graphs need rows that may be absent."""
    eager = ModelRunner(model, backend, sampler, batch)
    if backend.name != "triton":
        return eager
    # Triton is there then, and is not loaded elsewhere.
    module = import_module("engine.execution.graph_runner")
    shape = batch.block_tables.shape
    return cast(Runner, module.GraphRunner.on_cuda(eager, backend, unused_token_ids, *shape))
