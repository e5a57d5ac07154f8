"""Ropeway's engine: a paged, continuously batching server of RoPE GPT-2 models, without HTTP.

The public names load on first use (PEP 562), so that importing `engine` does not load PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import RopewayError as RopewayError
    from engine.frontend.client import AsyncEngine as AsyncEngine
    from engine.llm import LLM as LLM
    from engine.llm import Completion as Completion
    from engine.llm import Score as Score
    from engine.params import RequestOptions as RequestOptions
    from engine.params import SamplingParams as SamplingParams
    from engine.request import FinishReason as FinishReason
    from engine.scaling import RopeScaling as RopeScaling

_HOMES = {
    "AsyncEngine": "engine.frontend.client",
    "Completion": "engine.llm",
    "FinishReason": "engine.request",
    "LLM": "engine.llm",
    "RequestOptions": "engine.params",
    "RopeScaling": "engine.scaling",
    "RopewayError": "engine.errors",
    "SamplingParams": "engine.params",
    "Score": "engine.llm",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "FinishReason",
    "RequestOptions",
    "RopeScaling",
    "RopewayError",
    "SamplingParams",
    "Score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
