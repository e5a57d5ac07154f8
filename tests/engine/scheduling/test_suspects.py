"""After a crash: what the engine died with runs alone until it has come further."""

from __future__ import annotations

from engine.params import RequestOptions, SamplingParams
from engine.request import Request, RequestStatus
from tests.engine.scheduling.test_scheduler import make, shape, step


def request(name: str, num_prompt_tokens: int = 5, suspect_at: int | None = 0) -> Request:
    return Request(
        name,
        list(range(num_prompt_tokens)),
        SamplingParams(),
        seed=0,
        max_tokens=6,
        stop_token_ids=frozenset(),
        options=RequestOptions(cache_salt=name),
        suspect_at=suspect_at,
    )


def test_suspects_run_one_at_a_time_before_all_others() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("innocent", suspect_at=None))
    scheduler.add(request("a", 10))
    scheduler.add(request("b"))
    for expected in ({"a": (0, 8)}, {"a": (8, 2)}, {"b": (0, 5)}):
        output, _ = step(scheduler)
        assert shape(output) == expected
        assert output.alone
    output, _ = step(scheduler)
    assert not output.alone
    assert shape(output) == {"a": (10, 1), "b": (5, 1), "innocent": (0, 5)}


def test_a_suspect_runs_alone_until_it_has_the_token_that_the_engine_died_at() -> None:
    """The two before it were on their way to the frontend, and died too."""
    scheduler = make(budget=8)
    scheduler.add(request("innocent", suspect_at=None))
    scheduler.add(request("a", suspect_at=2))
    for expected in ({"a": (0, 5)}, {"a": (5, 1)}, {"a": (6, 1)}):
        output, _ = step(scheduler)
        assert shape(output) == expected
        assert output.alone
    output, _ = step(scheduler)
    assert not output.alone
    assert shape(output) == {"a": (7, 1), "innocent": (0, 5)}


def test_what_runs_waits_for_a_suspect() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("runs", suspect_at=None))
    step(scheduler)
    scheduler.add(request("a"))
    assert shape(step(scheduler)[0]) == {"a": (0, 5)}
    assert shape(step(scheduler)[0]) == {"runs": (5, 1), "a": (5, 1)}


def test_a_suspect_without_room_waits_and_is_next() -> None:
    scheduler = make(num_blocks=4, max_num_seqs=2, budget=8)
    scheduler.add(request("runs", 6, suspect_at=None))
    step(scheduler)
    scheduler.add(request("late", 1, suspect_at=None))
    scheduler.add(request("a", 9))
    while True:
        output, outputs = step(scheduler)
        assert shape(output).keys() == {"runs"}
        if outputs[0].finish_reason is not None:
            break
    assert shape(step(scheduler)[0]) == {"a": (0, 8)}
    assert shape(step(scheduler)[0]) == {"a": (8, 1)}
    assert shape(step(scheduler)[0]) == {"a": (9, 1), "late": (0, 1)}


def test_a_suspect_that_goes_is_forgotten() -> None:
    scheduler = make(budget=8)
    waits, runs = request("waits"), request("runs", 20)
    scheduler.add(runs)
    scheduler.add(waits)
    scheduler.add(request("innocent", suspect_at=None))
    step(scheduler)
    assert runs.status is RequestStatus.RUNNING
    scheduler.abort("waits")
    scheduler.abort("runs")
    assert shape(step(scheduler)[0]) == {"innocent": (0, 5)}
