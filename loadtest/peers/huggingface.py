"""Hugging Face transformers: `generate` with a fixed batch, and its continuous batching."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadtest.errors import Unmeasurable
from loadtest.peers.base import Rates
from loadtest.workload import Measured, Workload

PAGE, SPARE_BLOCKS, BATCH_TOKENS = 64, 8, 2048
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

    def __init__(self, model: Any, threads: int, streams: int, context: int) -> None:
        """streams: the most at once; context: tokens of one stream. The cache holds just these.

        Left to itself it takes nine tenths of the free memory.
        """
        self.name = "transformers continuous"
        self._model = model
        self._threads = threads
        self._settings = transformers.ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=streams * -(-context // PAGE) + SPARE_BLOCKS,
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=streams,
        )

    def run(self, workload: Workload, repeat: int) -> Rates:
        """See Offline."""
        torch.set_num_threads(self._threads)
        generation = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=workload.output_tokens,
            eos_token_id=-1,
            pad_token_id=0,
        )
        measured = Measured()
        outputs = self._model.generate_batch(
            inputs=workload.prompts(repeat),
            generation_config=generation,
            continuous_batching_config=self._settings,
            record_timestamps=True,
            warmup=False,  # captures CUDA graphs
        )
        measured.arrivals = {at: each.timestamps for at, each in enumerate(outputs.values())}
        made = [len(times) for times in measured.arrivals.values()]
        if made != [workload.output_tokens] * workload.streams:
            raise Unmeasurable(f"generate_batch made {made} tokens")
        measured.seconds = max(times[-1] for times in measured.arrivals.values())
        measured.seconds -= measured.started
        return Rates(measured.tokens_per_s, measured.decode_tokens_per_s)

    def prefill(self, tokens: int, repeat: int) -> None:
        """See Offline: what it does before a prompt's first token is more than the prompt."""
        return
