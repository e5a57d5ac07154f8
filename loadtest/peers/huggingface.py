"""Hugging Face transformers: `generate` with a fixed batch, and its continuous batching."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadtest.client import Unmeasurable
from loadtest.peers.base import Rates
from loadtest.workload import Workload

INSTALLED = find_spec("transformers") is not None
transformers: Any = import_module("transformers") if INSTALLED else None


def load(neox: Path, dtype: str) -> Any:
    """The model, from the GPT-NeoX directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(neox, dtype=getattr(torch, dtype))


class Clock:
    """A stopping criterion that never stops, and notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Called after each token of the batch; input_ids: [batch, tokens so far]."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Generate:
    """`model.generate` on a batch that starts and ends together."""

    def __init__(self, model: Any, threads: int, vocab_size: int) -> None:
        self.name = "transformers generate"
        self._model = model
        self._threads = threads
        self._vocab_size = vocab_size

    def run(self, workload: Workload, repeat: int) -> Rates:
        """See Offline."""
        start, times = self._times(workload, repeat)
        tokens = workload.streams * workload.output_tokens
        after = tokens - workload.streams
        return Rates(tokens / (times[-1] - start), after / (times[-1] - times[0]))

    def prefill(self, tokens: int, repeat: int) -> float:
        """See Offline."""
        start, times = self._times(Workload(1, tokens, 2, self._vocab_size), repeat)
        return tokens / (times[0] - start)

    def _times(self, workload: Workload, repeat: int) -> tuple[float, list[float]]:
        """When it started, and when each step had its tokens."""
        torch.set_num_threads(self._threads)
        prompts = torch.tensor(workload.prompts(repeat))
        clock = Clock()
        start = time.perf_counter()
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=workload.output_tokens,
            max_new_tokens=workload.output_tokens,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        if len(clock.times) != workload.output_tokens:
            raise Unmeasurable(f"generate made {len(clock.times)} tokens")
        return start, clock.times


class ContinuousBatching:
    """`model.generate_batch`, which admits and ends requests one by one."""

    def __init__(self, model: Any, threads: int) -> None:
        self.name = "transformers continuous"
        self._model = model
        self._threads = threads

    def run(self, workload: Workload, repeat: int) -> Rates:
        """See Offline; it tells the whole time only."""
        torch.set_num_threads(self._threads)
        settings = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=workload.output_tokens,
            eos_token_id=-1,
            pad_token_id=0,
        )
        start = time.perf_counter()
        outputs = self._model.generate_batch(
            inputs=workload.prompts(repeat), generation_config=settings, progress_bar=False
        )
        seconds = time.perf_counter() - start
        made = [len(each.generated_tokens) for each in outputs.values()]
        if made != [workload.output_tokens] * workload.streams:
            raise Unmeasurable(f"generate_batch made {made} tokens")
        return Rates(sum(made) / seconds, None)

    def prefill(self, tokens: int, repeat: int) -> None:
        """See Offline: not told apart."""
        return
