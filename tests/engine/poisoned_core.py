"""`engine.core`, but one token in a prompt kills the process at the third token of the output."""

from __future__ import annotations

import os
import signal
import sys

from engine import core
from engine.execution.runner import InputBatch, ModelRunner, Runner
from engine.execution.sampler import Sampler
from engine.messages import SchedulerOutput, StepResult
from engine.model.attention.base import AttentionBackend
from engine.model.gpt2 import GPT2

POISON = 13
HARMLESS_TOKENS = 2


class MortalRunner(ModelRunner):
    """Dies as by a fault in a kernel: at once, with whatever else is computed."""

    def execute(self, step: SchedulerOutput) -> StepResult:
        for item in step.scheduled:
            request = item.request
            poisoned = POISON in request.token_ids[: request.num_prompt_tokens]
            if poisoned and request.num_output_tokens >= HARMLESS_TOKENS:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(step)


def select_mortal(
    model: GPT2, backend: AttentionBackend, sampler: Sampler, batch: InputBatch, _: object
) -> Runner:
    """In place of select_runner."""
    return MortalRunner(model, backend, sampler, batch)


if __name__ == "__main__":
    core.select_runner = select_mortal
    sys.exit(core.main())
