"""A request: which pages it may hold, what of it is scored, and how far it has come."""

from __future__ import annotations

import enum

import msgspec

from engine.params import RequestOptions, SamplingParams
from engine.scaling import MAX_CONTEXT, UNSCALED

SINK_BLOCKS = 1
"""Pages at the beginning that a shift keeps: what they hold, every later token attends to (Xiao et
al. 2023, arXiv 2309.17453: attention sinks)."""


class FinishReason(enum.StrEnum):
    """Why a request was complete. One that failed or was aborted has no finish reason."""

    STOP = "stop"  # an end token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens
    TIMEOUT = "timeout"  # timeout_s


class RequestStatus(enum.Enum):
    """Where a request is in the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Window(msgspec.Struct, frozen=True):
    """The pages that a request with overflow `shift` holds at most: the first, and the last.

    The oldest page after the sinks is dropped exactly when the token that begins a new one is
    computed. So what a token sees is a function of its stream index, counted from the first token
    of the prompt, and of nothing else.
    """

    block_size: int
    num_blocks: int
    num_sinks: int = SINK_BLOCKS

    def num_dropped_blocks(self, index: int) -> int:
        """Pages dropped before the token `index` is computed."""
        return max(0, index // self.block_size - self.num_blocks + 1)

    def chunk_end(self, start: int) -> int:
        """The index up to which tokens from `start` on see the same pages."""
        return (max(start // self.block_size, self.num_blocks - 1) + 1) * self.block_size


class Targets(msgspec.Struct, frozen=True):
    """Tokens whose log-probability is wanted, whatever is sampled.

    token_ids[i] is the one behind the token `first + i` of the prompt, so len(token_ids) rows of
    the model are scored.
    """

    first: int
    token_ids: list[int]


class Request:
    """One stream of tokens in the engine. Only the scheduler writes to it.

    token_ids is the prompt and then the output. num_computed_tokens of them have their keys and
    values in the cache, at the pages of block_table, whose first positions are bases; of its window
    num_dropped_blocks pages are gone. num_scored of its targets are done.

    arrival: when it came, in seconds on the scheduler's clock; scheduled: when its first step
    began. num_cached_tokens: of the prompt, found in the prefix cache then. The first
    num_remembered_blocks pages of the table are known to that cache under the number `prefix`, None
    where they cannot be. num_shared_blocks: leading pages of the prompt that lie in a declared
    prefix, so that they are known without the salt.

    scaling: the rotation in force while it runs, at the row `profile` of the engine's tables, until
    its span is more than steady_until.

    turn: where it stands in the queue, least first; its second part numbers the arrivals. pinned:
    it runs and may not be preempted. suspect: it runs alone for now.
    """

    __slots__ = (
        "arrival",
        "bases",
        "block_table",
        "choice",
        "finish_reason",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_dropped_blocks",
        "num_preemptions",
        "num_prompt_tokens",
        "num_remembered_blocks",
        "num_scored",
        "num_shared_blocks",
        "options",
        "params",
        "pinned",
        "prefix",
        "profile",
        "request_id",
        "scaling",
        "scheduled",
        "seed",
        "status",
        "steady_until",
        "stop_token_ids",
        "suspect_at",
        "targets",
        "token_ids",
        "turn",
        "window",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        max_tokens: int,
        stop_token_ids: frozenset[int],
        options: RequestOptions = RequestOptions(),
        window: Window | None = None,
        targets: Targets | None = None,
        output_token_ids: list[int] | None = None,
        choice: int = 0,
        suspect_at: int | None = None,
    ) -> None:
        """window: where it may outgrow the context, and shifts then. targets: what of its prompt is
        scored. output_token_ids: what an earlier engine had generated for it already. suspect_at:
        an engine died while it computed this token of the output, among other requests perhaps; so
        it runs alone until it has it.
        """
        self.request_id = request_id
        self.token_ids = prompt_token_ids + (output_token_ids or [])
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.options = options
        self.window = window
        self.targets = targets
        self.num_scored = 0
        self.seed = seed
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        self.choice = choice
        self.arrival = 0.0
        self.scheduled: float | None = None
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_dropped_blocks = 0
        self.num_remembered_blocks = 0
        self.scaling = UNSCALED
        self.profile = 0
        self.steady_until = MAX_CONTEXT
        self.num_shared_blocks = 0
        self.prefix: int | None = None
        self.num_preemptions = 0
        self.turn = (0.0, 0)
        self.pinned = False
        self.suspect_at = suspect_at
        self.block_table: list[int] = []
        self.bases: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def span(self) -> int:
        """Positions that its tokens stand at, or stood before the first shift."""
        if self.window is None:
            return self.num_tokens
        return min(self.num_tokens, self.window.num_blocks * self.window.block_size)

    @property
    def next_scored(self) -> int | None:
        """The first token of the prompt behind which a score is missing; None where none is."""
        if self.targets is None or self.num_scored == len(self.targets.token_ids):
            return None
        return self.targets.first + self.num_scored

    @property
    def suspect(self) -> bool:
        """Whether an engine may have died of it."""
        return self.suspect_at is not None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far: the stream index of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens
