"""`engine.core`, but one token in a prompt kills the process at the third token of the output.

What a process has just sent may die with it. Here it does for one request, always.
"""

from __future__ import annotations

import os
import signal
import sys

from engine import core
from engine.execution.inputs import InputBatch
from engine.execution.runner import ModelRunner, Runner
from engine.execution.sampler import Sampler
from engine.messages import EngineOutput, SchedulerOutput, StepResult
from engine.model.attention.base import AttentionBackend
from engine.model.gpt2 import GPT2

POISON = 13
HARMLESS_TOKENS = 2
LOSES = "loses"
"""Request id of the one whose last token before the death never arrives."""


class MortalRunner(ModelRunner):
    """Dies as by a fault in a kernel: at once, with whatever else is computed."""

    def execute(self, step: SchedulerOutput) -> StepResult:
        for item in step.scheduled:
            request = item.request
            poisoned = POISON in request.token_ids[: request.num_prompt_tokens]
            if poisoned and request.num_output_tokens >= HARMLESS_TOKENS:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(step)


class LossyLoop(core.EngineLoop):
    """Loses what was on its way when the process died."""

    def _publish(self, outputs: list[EngineOutput]) -> None:
        lost = (LOSES, HARMLESS_TOKENS - 1)
        super()._publish([each for each in outputs if (each.request_id, each.index) != lost])


def select_mortal(
    model: GPT2, backend: AttentionBackend, sampler: Sampler, batch: InputBatch, _: object
) -> Runner:
    """In place of select_runner."""
    return MortalRunner(model, backend, sampler, batch)


if __name__ == "__main__":
    core.select_runner = select_mortal
    core.EngineLoop = LossyLoop  # type: ignore[misc]  # for main()
    sys.exit(core.main())
