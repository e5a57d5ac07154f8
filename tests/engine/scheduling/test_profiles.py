"""Rows of rotation profiles: shared by equals, kept while idle, waited for."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.messages import ProfileRow
from engine.params import RequestOptions, SamplingParams
from engine.request import Request
from engine.scaling import UNSCALED, RopeScaling
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.profiles import ProfileRows
from engine.scheduling.scheduler import Scheduler
from tests.engine.scheduling.test_scheduler import shape, step

TRAINED = 16
LINEAR = RopeScaling(type="linear", factor=2)
NTK = RopeScaling(type="ntk", factor=2)
YARN = RopeScaling(type="yarn", factor=2)
DYNAMIC = RopeScaling(type="dynamic", factor=4)


def make(num_rows: int = 2, num_blocks: int = 64) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    return Scheduler(
        config, BlockPool(num_blocks, 4), profiles=ProfileRows(UNSCALED, TRAINED, num_rows)
    )


def request(
    name: str, rope: RopeScaling | None, num_prompt_tokens: int = 2, max_tokens: int = 2
) -> Request:
    return Request(
        name,
        list(range(num_prompt_tokens)),
        SamplingParams(rope=rope),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        options=RequestOptions(cache_salt=name),
    )


def test_equal_rotations_share_a_row() -> None:
    scheduler = make(num_rows=3)
    requests = [request(f"r{at}", rope) for at, rope in enumerate((None, NTK, NTK, LINEAR))]
    for each in requests:
        scheduler.add(each)
    output, _ = step(scheduler)
    assert [each.profile for each in requests] == [0, 1, 1, 2]
    assert output.profiles == [
        ProfileRow(0, UNSCALED, 4),
        ProfileRow(1, NTK, 4),
        ProfileRow(2, LINEAR, 4),
    ]
    assert scheduler.stats.profiles == 3
    step(scheduler)
    assert scheduler.stats.profiles == 1


def test_one_without_a_row_waits_and_only_the_models_own_pass() -> None:
    scheduler = make(num_rows=2)
    scheduler.add(request("ntk", NTK, max_tokens=3))
    scheduler.add(request("linear", LINEAR))
    scheduler.add(request("more ntk", NTK))  # it would keep the row for ever
    scheduler.add(request("own", None))
    assert shape(step(scheduler)[0]).keys() == {"ntk", "own"}
    assert shape(step(scheduler)[0]).keys() == {"ntk", "own"}
    assert shape(step(scheduler)[0]).keys() == {"ntk"}
    output, _ = step(scheduler)
    assert shape(output).keys() == {"linear"}
    assert output.profiles == [ProfileRow(1, LINEAR, 4)]
    step(scheduler)
    output, _ = step(scheduler)
    assert shape(output).keys() == {"more ntk"}
    assert output.profiles == [ProfileRow(1, NTK, 4)]


def test_an_idle_row_is_kept_until_it_is_needed() -> None:
    scheduler = make(num_rows=3)
    for name, rope in (("a", NTK), ("b", LINEAR), ("c", NTK)):
        scheduler.add(request(name, rope))
        while scheduler.has_unfinished:
            output, _ = step(scheduler)
            assert not (name == "c" and output.profiles)  # its tables are still there
    scheduler.add(request("d", YARN))
    assert step(scheduler)[0].profiles == [ProfileRow(2, YARN, 4)]  # used longest ago


def test_dynamic_is_computed_again_where_its_factor_changes() -> None:
    scheduler = make(num_rows=2)
    dynamic = request("d", DYNAMIC, num_prompt_tokens=15, max_tokens=40)
    scheduler.add(dynamic)
    starts, scalings = [], []
    while scheduler.has_unfinished:
        output, _ = step(scheduler)
        ((start, count),) = shape(output).values()
        starts.append((start, count))
        scalings.append(output.scheduled[0].request.scaling)
        assert dynamic.num_preemptions == 0
    assert starts[:5] == [(0, 15), (15, 1), (0, 17), (17, 1), (18, 1)]
    assert starts[17:20] == [(31, 1), (0, 33), (33, 1)]
    assert scalings[:3] == [UNSCALED, UNSCALED, RopeScaling(type="ntk", factor=5)]
    assert scalings[18] == RopeScaling(type="ntk", factor=13)
    assert len(starts) == 40
    assert scheduler.stats.preemptions == 0


def test_a_step_of_dynamic_waits_for_a_row() -> None:
    scheduler = make(num_rows=2)
    scheduler.add(request("d", DYNAMIC, num_prompt_tokens=15, max_tokens=9))
    scheduler.add(request("ntk", NTK, max_tokens=5))
    seen = [sorted(shape(step(scheduler)[0])) for _ in range(7)]
    assert seen[:2] == [["d", "ntk"]] * 2
    assert seen[2:5] == [["ntk"]] * 3  # the only other row is taken
    assert seen[5:] == [["d"]] * 2


def test_a_row_reaches_as_far_as_its_requests() -> None:
    scheduler = make(num_rows=2)
    scheduler.add(request("a", NTK, num_prompt_tokens=10, max_tokens=30))
    extents = []
    while scheduler.has_unfinished:
        output, _ = step(scheduler)
        extents += [each.num_positions for each in output.profiles]
    assert extents == [12, 24, 48]
