"""Scheduler and pool through random lives: arrivals, aborts, timeouts, priorities, shared prefixes,
shifts, suspects, rotations and tiny pools. What the pages hold is played along, token by token."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.config import SchedulerConfig
from engine.messages import (
    SampledToken,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from engine.params import RequestOptions, SamplingParams
from engine.request import SINK_BLOCKS, FinishReason, Request, RequestStatus, Targets, Window
from engine.scaling import RopeScaling
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.profiles import ProfileRows
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.shared import SharedPrefixes

SIZE = 4
WINDOW = Window(SIZE, 3)
MAX_PREEMPTIONS = 2
TRAINED = 9
DECLARED = list(range(10))
"""All salts share its two whole pages."""
OWN = RopeScaling(type="yarn", factor=2)
ROPES = (
    *[None] * 5,
    OWN,
    RopeScaling(type="linear", factor=2),
    RopeScaling(type="dynamic", factor=2),
    RopeScaling(type="dynamic", factor=3, original_context=5),
    RopeScaling(type="ntk", factor=3),  # what the first dynamic one becomes
)


class Lives(RuleBasedStateMachine):
    """One scheduler, from its first request to its last."""

    @initialize(
        num_blocks=st.integers(3, 14),
        max_num_seqs=st.integers(1, 5),
        extra=st.integers(0, 12),
        rows=st.integers(2, 4),
        look_ahead=st.booleans(),
    )
    def begin(
        self, num_blocks: int, max_num_seqs: int, extra: int, rows: int, look_ahead: bool
    ) -> None:
        self.now = 0.0
        self.pool = BlockPool(num_blocks, SIZE)
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra,
            max_preemptions=MAX_PREEMPTIONS,
        )
        self.profiles = ProfileRows(OWN, TRAINED, rows)
        shared = SharedPrefixes([DECLARED, [5] * SIZE], SIZE)
        self.look_ahead = look_ahead
        self.scheduler = Scheduler(
            config, self.pool, lambda: self.now, self.profiles, shared, look_ahead
        )
        self.tables: dict[int, tuple[RopeScaling, int]] = {}  # what the runner was told of rows
        self.alive: dict[str, Request] = {}
        self.seen: dict[str, list[int]] = {}
        self.content: dict[tuple[int, int], object] = {}  # (block, offset) -> what was computed
        self.count = 0
        self.sampled = 0
        self.prompted = 0

    @rule(
        shared=st.integers(0, 12),
        own=st.integers(1, 12),
        max_tokens=st.integers(1, 30),
        priority=st.sampled_from([0, 0, 0, 1, -2, 9]),
        timeout_s=st.sampled_from([None, None, 3.0, 30.0]),
        salt=st.sampled_from(["", "", "x"]),
        shift=st.booleans(),
        suspected=st.sampled_from([None] * 8 + [0, 2]),
        done=st.integers(0, 5),
        rope=st.sampled_from(ROPES),
        scored_from=st.sampled_from([None, None, None, 0, 3]),
    )
    def add(
        self,
        shared: int,
        own: int,
        max_tokens: int,
        priority: int,
        timeout_s: float | None,
        salt: str,
        shift: bool,
        suspected: int | None,
        done: int,
        rope: RopeScaling | None,
        scored_from: int | None,
    ) -> None:
        """done: tokens that it had in an earlier engine; suspected: how many more that had
        computed when it died; scored_from: the first row that is scored,
        of a request that has none yet."""
        capacity = self.pool.num_blocks * SIZE
        prompt = [*range(shared), *[100 + self.count % 3] * own]
        if not shift:
            prompt = prompt[:capacity]
            max_tokens = min(max_tokens, capacity + 1 - len(prompt))
        self.count += 1
        done = min(done, max_tokens - 1)
        targets = None
        if scored_from is not None and scored_from < len(prompt) and not done:
            targets = Targets(scored_from, list(range(1000, 1000 + len(prompt) - scored_from)))
        request = Request(
            f"r{self.count}",
            prompt,
            SamplingParams(rope=rope),
            seed=0,
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
            options=RequestOptions(priority=priority, timeout_s=timeout_s, cache_salt=salt),
            window=WINDOW if shift else None,
            targets=targets,
            output_token_ids=[7] * done,
            suspect_at=None if suspected is None else done + suspected,
        )
        self.scheduler.add(request, elapsed_s=0.5 * done)
        self.alive[request.request_id] = request
        self.seen[request.request_id] = list(range(done))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.abort(name)
        del self.alive[name]
        self.check()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    def step(self) -> None:
        scheduler, preemptions = self.scheduler, self.scheduler.stats.preemptions
        shifted = [each for each in self.alive.values() if each.num_dropped_blocks]
        output = scheduler.schedule()
        assert output.num_tokens <= scheduler.config.max_num_batched_tokens
        assert scheduler.stats.running <= scheduler.config.max_num_seqs
        for each in shifted:
            assert each.status is not RequestStatus.WAITING, "a shifted request was preempted"
        if scheduler.stats.preemptions == preemptions:
            self.check_nobody_waits_in_vain(output)
        self.compute(output)
        sampled = [SampledToken(7) for item in output.scheduled if item.samples]
        self.sampled += len(sampled)
        scores = {item.request.request_id: scored(item) for item in output.scheduled}
        for one in scheduler.update(output, StepResult(sampled, scores)):
            request = self.alive[one.request_id]
            if one.token_id is not None and one.index == 0:
                self.prompted += request.num_prompt_tokens
                if request.targets is not None:
                    assert one.scores is not None
                    assert [each.logprob for each in one.scores] == request.targets.token_ids
            else:
                assert one.scores is None
            if one.token_id is None:
                assert one.finish_reason is FinishReason.TIMEOUT
                assert one.index == len(self.seen[one.request_id])
            else:
                self.seen[one.request_id].append(one.index)
            if one.finish_reason is not None:
                del self.alive[one.request_id]
                if one.finish_reason is FinishReason.LENGTH:
                    assert len(self.seen[one.request_id]) == request.max_tokens
            assert self.seen[one.request_id] == list(range(len(self.seen[one.request_id])))
        for each in self.alive.values():
            timeout_s = each.options.timeout_s
            assert timeout_s is None or each.arrival + timeout_s > self.now
        assert scheduler.stats.output_tokens == self.sampled
        assert scheduler.stats.prompt_tokens == self.prompted
        self.check()

    def compute(self, output: SchedulerOutput) -> None:
        """Play the model: write what every row leaves, then read what it sees."""
        for each in output.profiles:
            self.tables[each.row] = (each.scaling, each.num_positions)
        for item in output.scheduled:
            scaling, extent = self.tables[item.request.profile]
            assert scaling == item.request.scaling == expected_scaling(item.request)
            assert item.position + item.num_tokens <= extent
        for item in output.scheduled:
            assert item.start == item.request.num_computed_tokens
            for step in range(item.num_tokens):
                index, place = item.start + step, item.position + step
                slot = (item.request.block_table[place // SIZE], place % SIZE)
                self.content[slot] = what(item.request, index)
        for item in output.scheduled:
            request = item.request
            shift = request.num_dropped_blocks
            assert request.bases == [at * SIZE for at in range(len(request.block_table))]
            for index in range(item.start + item.num_tokens):
                if SINK_BLOCKS <= index // SIZE < SINK_BLOCKS + shift:  # dropped
                    continue
                page = index // SIZE if index // SIZE < SINK_BLOCKS else index // SIZE - shift
                slot = (request.block_table[page], index % SIZE)
                assert self.content[slot] == what(request, index), "a page holds something else"
        if self.look_ahead:
            self.run_ahead(output)

    def run_ahead(self, output: SchedulerOutput) -> None:
        """Play GraphRunner: the next token of a stream that goes on is computed already."""
        for item in output.scheduled:
            request, place = item.request, item.position + item.num_tokens
            last = request.num_output_tokens + 1 == request.max_tokens
            if item.samples and not last and place // SIZE < len(request.block_table):
                assert self.tables[request.profile][1] > place
                self.content[request.block_table[place // SIZE], place % SIZE] = "for nothing"

    def check_nobody_waits_in_vain(self, output: SchedulerOutput) -> None:
        """Whoever is first in the queue lacks pages, a row, budget or, pinned, its quota."""
        scheduler, config = self.scheduler, self.scheduler.config
        if output.alone:
            return
        for each in self.alive.values():
            if each.suspect and scheduler._fits_beside_pinned(each):
                # It is next, alone; the others wait for it until a row or pages are free.
                assert (
                    scheduler.tables.missing(each) > self.pool.num_free
                    or scheduler.stats.running == config.max_num_seqs
                    or not self.profiles.has_room(each)
                )
                return
        if output.num_tokens == config.max_num_batched_tokens:
            return
        if scheduler.stats.running == config.max_num_seqs:
            return
        assert output.scheduled or not scheduler.has_unfinished
        quota_fits = row_left = True
        for request in scheduler._waiting:
            if request.suspect:
                continue
            if not self.profiles.is_own(request):
                row_left = row_left and self.profiles.has_room(request)
                if not row_left:  # those of the model's own rotation may pass
                    continue
            if scheduler._must_pin(request):
                quota_fits = quota_fits and scheduler._quotas_fit(request)
                if not quota_fits:  # others may pass
                    continue
            pages = scheduler.tables.known_pages(request)
            missing = scheduler.tables.missing(request) - len(pages)
            assert missing > self.pool.num_free_without(pages)
            if scheduler._fits_beside_pinned(request):
                return  # it is next: those behind it wait

    def check(self) -> None:
        """Every block is free or held, exactly as the tables say; nobody holds more than needed."""
        held = Counter(block for each in self.alive.values() for block in each.block_table)
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == held[block]
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        assert self.pool.num_cached <= self.pool.num_blocks
        pinned = 0
        for each in self.alive.values():
            assert len(set(each.block_table)) == len(each.block_table)
            assert each.num_preemptions <= MAX_PREEMPTIONS
            if each.status is RequestStatus.WAITING:
                assert each.block_table == []
                assert each.num_computed_tokens == 0
                continue
            held_tokens = (len(each.block_table) + each.num_dropped_blocks) * SIZE
            assert each.num_computed_tokens <= held_tokens
            assert held_tokens < each.num_tokens + self.look_ahead + SIZE
            if each.window is not None:
                assert len(each.block_table) <= WINDOW.num_blocks
            pinned += self.scheduler.tables.quota(each) if each.pinned else 0
        assert pinned <= self.pool.num_blocks
        running = [each for each in self.alive.values() if each.status is RequestStatus.RUNNING]
        rows = {each.profile: each.scaling for each in running}
        assert all(rows[each.profile] == each.scaling for each in running)
        assert self.profiles.num_in_force == len({0, *rows})

    def teardown(self) -> None:
        """Everything ends, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.alive:
                break
            self.step()
        assert not self.alive
        assert not self.scheduler.has_unfinished
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler._deadlines == []
        assert self.scheduler._suspects == []
        assert self.profiles.num_in_force == 1
        assert self.scheduler._scores == {}


def expected_scaling(request: Request) -> RopeScaling:
    """By the length alone, whatever happened before."""
    length = request.num_tokens
    if request.window is not None:
        length = min(length, WINDOW.num_blocks * SIZE)
    return (request.params.rope or OWN).in_force(length, TRAINED)


def scored(item: ScheduledRequest) -> list[TokenLogprobs]:
    """Play the runner: what is wanted behind the rows of this step, each known by its token."""
    targets, row = item.request.targets, item.request.next_scored
    if targets is None or row is None:
        return []
    assert row >= item.start, "a row that is to be scored was taken from the cache"
    end = max(0, item.start + item.num_tokens - targets.first)
    return [TokenLogprobs(each, []) for each in targets.token_ids[row - targets.first : end]]


def what(request: Request, index: int) -> object:
    """What the page of a token must hold: all that its keys and values depend on."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    num_shared = sum(prompt[:end] == DECLARED[:end] for end in (SIZE, 2 * SIZE))
    salt = request.options.cache_salt if index // SIZE >= num_shared else "any"
    known = (request.scaling, salt, tuple(request.token_ids[: index + 1]))
    dropped = 0 if request.window is None else request.window.num_dropped_blocks(index)
    return (known, dropped)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=50)
