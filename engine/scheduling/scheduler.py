"""Which tokens the next step computes. With its tables, the only writer of Request state.

There is no prefill phase and no decode phase. A request has num_tokens known tokens, of which
num_computed_tokens are in the cache; a step computes some of the rest, at most
max_num_batched_tokens over all requests. Chunked prefill, preemption and recovery are one rule.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import count

from engine.config import SchedulerConfig
from engine.messages import (
    EngineOutput,
    EngineStats,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from engine.request import FinishReason, Request, RequestStatus
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.profiles import ProfileRows
from engine.scheduling.shared import SharedPrefixes
from engine.scheduling.tables import BlockTables, reach


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca) over paged memory (Kwon et al. 2023, vLLM)."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        clock: Callable[[], float] = time.monotonic,
        profiles: ProfileRows | None = None,
        shared: SharedPrefixes | None = None,
        look_ahead: bool = False,
    ) -> None:
        """clock: seconds; for the time that requests wait, and their timeouts. profiles: None: the
        one of a model without a scaling. shared: None: nothing is. look_ahead: what is left of the
        pool goes to the tokens after a step's, for a runner that computes them before it is asked.
        """
        self.config = config
        self._look_ahead = look_ahead
        self.pool = pool
        self.profiles = ProfileRows() if profiles is None else profiles
        self.tables = BlockTables(pool, self.profiles)
        self._shared = SharedPrefixes([], pool.block_size) if shared is None else shared
        self._clock = clock
        self._waiting: list[Request] = []  # whose turn is next first
        self._running: list[Request] = []  # oldest first
        self._requests: dict[str, Request] = {}
        self._suspects: list[Request] = []  # each is to run alone
        self._released: list[str] = []
        self._deadlines: list[tuple[float, str]] = []  # soonest first
        self._ended: list[EngineOutput] = []  # without a token, in this step
        self._scores: dict[str, list[TokenLogprobs]] = {}  # until the request's next token
        self._numbers = count()
        self._steps = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would have work."""
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters as they stand."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            steps=self._steps,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            blocks_cached=self.pool.num_cached,
            profiles=self.profiles.num_in_force,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def add(self, request: Request, elapsed_s: float = 0.0) -> None:
        """Queue a request. Admission has made sure that it fits the cache when alone.

        elapsed_s: how long ago it came.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is here already")
        prompt = request.token_ids[: request.num_prompt_tokens]
        request.num_shared_blocks = self._shared.num_pages(prompt)
        request.arrival = self._clock() - elapsed_s
        advance = request.options.priority * self.config.priority_seconds
        request.turn = (request.arrival - advance, next(self._numbers))
        if (deadline := _deadline(request)) is not None:
            insort(self._deadlines, deadline)
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_turn)
        if request.suspect:
            self._suspects.append(request)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages; one that has ended already is no error."""
        request = self._requests.get(request_id)
        if request is not None:
            self._forget(request)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's tokens and give them pages.

        Streams that wait for their next token come before prompts, so that a long prompt takes what
        they leave of the budget. While there are suspects, each runs alone until it has come
        further than where an engine died.
        """
        self._steps += 1
        self._expire()
        scheduled: dict[str, ScheduledRequest] = {}
        alone = any(self._try_alone(suspect, scheduled) for suspect in self._suspects)
        if not alone:
            self._choose(scheduled)
        released, self._released = self._released, []
        chosen = list(scheduled.values())
        if self._look_ahead:
            self._grant_ahead(chosen)
        num_tokens = sum(item.num_tokens for item in chosen)
        return SchedulerOutput(chosen, released, num_tokens, alone, self.profiles.news())

    def _choose(self, scheduled: dict[str, ScheduledRequest]) -> None:
        """An ordinary step: what runs, and then what may start."""
        budget = self.config.max_num_batched_tokens
        num_running = len(self._running)
        for request in sorted(self._running, key=_num_uncomputed_beyond_one):
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:  # preempted for an earlier one
                continue
            budget += self._make_room(request, scheduled)
            if request.status is RequestStatus.RUNNING:
                budget -= self._take(request, budget, scheduled)
        if len(self._running) < num_running:
            return  # something was preempted: there is no room for more
        if not any(self._fits_beside_pinned(suspect) for suspect in self._suspects):
            self._admit(budget, scheduled)

    def _grant_ahead(self, chosen: list[ScheduledRequest]) -> None:
        """Give streams that go on the page of their next token, where some is free."""
        for item in chosen:
            if item.samples and item.request.num_output_tokens + 1 < item.request.max_tokens:
                self.tables.look_ahead(item.request)

    def _try_alone(self, suspect: Request, scheduled: dict[str, ScheduledRequest]) -> bool:
        """Compute nothing but a suspect. False: there is no room for it yet."""
        if suspect.status is RequestStatus.WAITING:
            if len(self._running) == self.config.max_num_seqs or not self._start(suspect):
                return False
        else:
            self._make_room(suspect, scheduled)
        if suspect.status is RequestStatus.RUNNING:
            self._take(suspect, self.config.max_num_batched_tokens, scheduled)
        return True

    def update(self, step: SchedulerOutput, result: StepResult) -> list[EngineOutput]:
        """Take in what a step computed."""
        outputs, self._ended = self._ended, []
        tokens = iter(result.sampled)
        for item in step.scheduled:
            request = item.request
            request.num_computed_tokens += item.num_tokens
            if scores := result.scores.get(request.request_id):
                request.num_scored += len(scores)
                self._scores.setdefault(request.request_id, []).extend(scores)
            self.tables.remember(request)
            if not item.samples:
                continue
            token = next(tokens)
            index = request.num_output_tokens
            if request.suspect_at is not None and index >= request.suspect_at:
                self._acquit(request)
            if token.error is not None:
                self._scores.pop(request.request_id, None)
                self._forget(request)
                outputs.append(
                    EngineOutput(request.request_id, index, None, None, error=token.error)
                )
                continue
            request.token_ids.append(token.token_id)
            self._output_tokens += 1
            queue_seconds = None
            if index == 0 and request.scheduled is not None:
                self._prompt_tokens += request.num_prompt_tokens
                queue_seconds = request.scheduled - request.arrival
            if token.token_id in request.stop_token_ids or token.ended:
                request.finish_reason = FinishReason.STOP
            elif request.num_output_tokens >= request.max_tokens:
                request.finish_reason = FinishReason.LENGTH
            all_scores = self._scores.pop(request.request_id, None)
            if request.finish_reason is not None:
                self._forget(request)
            elif request.span > request.steady_until:
                self._put_back(request)  # every token counts on the rotation: compute all again
            outputs.append(
                EngineOutput(
                    request.request_id,
                    index,
                    token.token_id,
                    request.finish_reason,
                    token.logprobs,
                    queue_seconds,
                    request.num_cached_tokens if index == 0 else 0,
                    all_scores,
                )
            )
        return outputs

    def _admit(self, budget: int, scheduled: dict[str, ScheduledRequest]) -> None:
        """Start waiting requests in their turn while budget, rows and pages last.

        One starts only when all its known tokens have room, so that it is not preempted halfway
        through its own prompt. One that may not be preempted starts only when everything that such
        requests may ever hold fits the pool; until then others pass it, since they can be. One
        whose rotation has no row is passed by those of the model's own: others would keep the rows.
        Others also pass one that must wait for a pinned one's end: it may be endless.
        """
        at = 0
        pinned_fit = rows_left = True
        while at < len(self._waiting) and budget and len(self._running) < self.config.max_num_seqs:
            request = self._waiting[at]
            if request.suspect:  # it runs alone, or not yet
                at += 1
                continue
            self.profiles.settle(request)
            if not self.profiles.is_own(request):
                rows_left = rows_left and self.profiles.has_room(request)
                if not rows_left:
                    at += 1
                    continue
            if self._must_pin(request):
                pinned_fit = pinned_fit and self._quotas_fit(request)
                if not pinned_fit:
                    at += 1
                    continue
            if not self._start(request):
                if self._fits_beside_pinned(request):
                    break
                at += 1
                continue
            budget -= self._take(request, budget, scheduled)

    def _start(self, request: Request) -> bool:
        """Let a waiting request run, with the pages of all that is known of it, if there are so
        many, and a row for its rotation."""
        self.profiles.settle(request)
        pages = self.tables.known_pages(request)
        missing = self.tables.missing(request) - len(pages)
        if missing > self.pool.num_free_without(pages) or not self.profiles.has_room(request):
            return False
        request.pinned = self._must_pin(request)
        if request.pinned and not self._quotas_fit(request):
            return False
        self._waiting.remove(request)
        self._running.append(request)
        request.status = RequestStatus.RUNNING
        self.profiles.take(request)
        self.tables.begin(request, pages)
        if request.scheduled is None:
            request.scheduled = self._clock()
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._prefix_queries += request.num_prompt_tokens
            self._prefix_hits += request.num_cached_tokens
        return True

    def _make_room(self, request: Request, scheduled: dict[str, ScheduledRequest]) -> int:
        """Give a running request its pages; while they are short, preempt the youngest of the
        lowest priority.

        Returns the tokens of this step that preemption took back. The request itself may be the one
        that is preempted. Somebody always remains: alone each fits, and the pinned fit together.
        """
        self.tables.shift(request)
        refund = 0
        while (missing := self.tables.missing(request)) > self.pool.num_free:
            victim = min((each for each in self._running if not each.pinned), key=_worth)
            self._preemptions += 1
            victim.num_preemptions += 1
            self._put_back(victim)
            if (item := scheduled.pop(victim.request_id, None)) is not None:
                refund += item.num_tokens
            if victim is request:
                return refund
        if missing:
            self.tables.grow(request, missing)
        return refund

    def _put_back(self, request: Request) -> None:
        """From running to waiting; when it starts again, all that is known of it is computed."""
        self._running.remove(request)
        self._give_back(request)
        request.status = RequestStatus.WAITING
        self._released.append(request.request_id)
        insort(self._waiting, request, key=_turn)

    def _give_back(self, request: Request) -> None:
        """The pages and the row of a request that runs no more."""
        self.tables.end(request)
        self.profiles.give_back(request)

    def _take(self, request: Request, budget: int, scheduled: dict[str, ScheduledRequest]) -> int:
        """Schedule as many of the request's tokens as the budget allows; returns how many."""
        start = request.num_computed_tokens
        count = min(reach(request) - start, budget)
        samples = start + count == request.num_tokens
        position = start - request.num_dropped_blocks * self.pool.block_size
        scheduled[request.request_id] = ScheduledRequest(request, start, position, count, samples)
        return count

    def _expire(self) -> None:
        """End every request whose time is up, whether it runs or waits."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self._requests[self._deadlines[0][1]]
            request.finish_reason = FinishReason.TIMEOUT
            index = request.num_output_tokens
            self._ended.append(EngineOutput(request.request_id, index, None, request.finish_reason))
            self._forget(request)

    def _must_pin(self, request: Request) -> bool:
        """Whether it may not be preempted once it runs: what has shifted would have to be computed
        from its first token on, and what was preempted often enough has its turn."""
        return request.window is not None or request.num_preemptions >= self.config.max_preemptions

    def _quotas_fit(self, request: Request) -> bool:
        """Whether the pool could hold all pinned requests and this one at their longest.

        Then a pinned request always gets its pages, if need be from those that can be preempted.
        """
        pinned = sum(self.tables.quota(each) for each in self._running if each.pinned)
        return pinned + self.tables.quota(request) <= self.pool.num_blocks

    def _fits_beside_pinned(self, request: Request) -> bool:
        """Whether a waiting request can start before any pinned one ends, once the others do."""
        pinned = [each for each in self._running if each.pinned]
        if not self.profiles.has_room_beside(request, pinned):
            return False
        if self._must_pin(request):
            return self._quotas_fit(request)
        held = sum(self.tables.quota(each) for each in pinned)
        return held + self.pool.blocks_for(reach(request)) <= self.pool.num_blocks

    def _acquit(self, request: Request) -> None:
        """It has come further than where an engine died, or it is gone."""
        if request.suspect:
            request.suspect_at = None
            self._suspects.remove(request)

    def _forget(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._give_back(request)
        else:
            self._waiting.remove(request)
        self._acquit(request)
        if (deadline := _deadline(request)) is not None:
            del self._deadlines[bisect_left(self._deadlines, deadline)]
        request.status = RequestStatus.FINISHED
        self._released.append(request.request_id)
        self._scores.pop(request.request_id, None)
        del self._requests[request.request_id]


def _turn(request: Request) -> tuple[float, int]:
    """Sort key of the queue: who came first, with what its priority is worth."""
    return request.turn


def _deadline(request: Request) -> tuple[float, str] | None:
    """When its time is up, where it has a limit."""
    timeout_s = request.options.timeout_s
    return None if timeout_s is None else (request.arrival + timeout_s, request.request_id)


def _worth(request: Request) -> tuple[int, int]:
    """Sort key of victims: the youngest of the lowest priority is the least."""
    return request.options.priority, -request.turn[1]


def _num_uncomputed_beyond_one(request: Request) -> bool:
    """Sort key: streams that need one token first, prompts and recomputations after."""
    return request.num_tokens - request.num_computed_tokens > 1
