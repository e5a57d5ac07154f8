"""What passes between rooms. Between processes it travels as MessagePack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from engine.params import RequestOptions, SamplingParams
from engine.request import FinishReason, Request, Targets, Window
from engine.scaling import UNSCALED, RopeScaling


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Frontend to core: generate.

    The seed and max_tokens are settled at admission, so that a request that is added again (after a
    crash, with the output_token_ids it had) goes on as if nothing had happened. window: where it
    may outgrow the context, and shifts then; truncated_tokens: what its prompt lost. targets: what
    is to be scored of it. elapsed_s: how long ago it came, where it is added again; suspect_at:
    the engine died while it computed this token of its output, or a prompt for it.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    options: RequestOptions = RequestOptions()
    window: Window | None = None
    truncated_tokens: int = 0
    targets: Targets | None = None
    output_token_ids: list[int] = []
    choice: int = 0
    elapsed_s: float = 0.0
    suspect_at: int | None = None


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: nobody wants this any more; free its pages."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: a worker is here; answered with EngineReady."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the model's own probabilities.

    logprob: of the token that was taken; top: (token id, logprob), likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


class EngineOutput(msgspec.Struct, frozen=True, array_like=True):
    """Core to frontend: what a step gave one request.

    index: stream index of the token. token_id: None where the request ended without one, at its
    timeout; then index is that of the token that would have come. queue_seconds: how long the
    request waited for its first step, sent with its first token, as is cached_tokens: tokens of its
    prompt that were not computed, and scores, of its targets. error: why the request cannot go on;
    it is the last output then, and has no token.
    """

    request_id: str
    index: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    queue_seconds: float | None = None
    cached_tokens: int = 0
    scores: list[TokenLogprobs] | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Whether the engine has forgotten the request."""
        return self.finish_reason is not None or self.error is not None


class EngineStats(msgspec.Struct, frozen=True):
    """The core's gauges and counters, as of the last step.

    blocks_free: held by nobody; blocks_cached: in the prefix cache, held or not. profiles:
    rotations in force, the model's own among them. prefix_queries: tokens of the prompts that
    began; prefix_hits: those of them that were cached.
    """

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    profiles: int = 1
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """Core to one frontend: one message per step."""

    outputs: list[EngineOutput]
    stats: EngineStats


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Core to frontend: the model is loaded and can serve; the sizes that were settled.

    max_position: the trained context; rope: the model's own scaling of it; max_profiles: how many
    rotations can be in force at once, that one among them. graphs: of decode steps on CUDA, a line
    for people.

    suspects: requests that the engine process before this one computed when it died, and the index
    of the token that each was computed for; poisoned: one that was a suspect already, and was
    computed alone.
    """

    model: str
    num_parameters: int
    device: str
    dtype: str
    attention: str
    products: str
    graphs: str = ""
    num_blocks: int
    block_size: int
    kv_bytes: int
    max_position: int
    eos_token_id: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    threads: int
    rope: RopeScaling = UNSCALED
    rotary_dim: int = 0
    learned_frequencies: bool = False
    max_profiles: int = 1
    notes: list[str] = []
    suspects: dict[str, int] = {}
    poisoned: list[str] = []

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, unless a request asks for another rotation."""
        return self.rope.context(self.max_position)


ToCore = AddRequest | AbortRequest | Hello
FromCore = StepOutput | EngineReady


class ScheduledRequest(NamedTuple):
    """Compute tokens start .. start + num_tokens - 1 of a request in this step.

    position: where the first of them stands; behind start by the pages that were dropped.
    samples: the last of them is the last known token, so a new one follows.
    """

    request: Request
    start: int
    position: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """A row of the table of profiles: a scaling in force, over num_positions or more."""

    row: int
    scaling: RopeScaling
    num_positions: int


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work.

    released: requests whose rows the runner may forget; alone: the step tries a suspect. profiles:
    what the tables of rotations must hold before it.
    """

    scheduled: list[ScheduledRequest]
    released: list[str]
    num_tokens: int
    alone: bool = False
    profiles: Sequence[ProfileRow] = ()


class SampledToken(NamedTuple):
    """What the sampler chose for one request.

    ended: its grammar lets nothing follow; error: why there is no token.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    ended: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    sampled: one token for each scheduled request that samples, in order; scores: by request id, the
    next targets of those that have some.
    """

    sampled: Sequence[SampledToken]
    scores: Mapping[str, list[TokenLogprobs]] = field(default_factory=dict)
