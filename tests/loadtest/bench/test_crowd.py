"""What a client saw is held against the run alone."""

from __future__ import annotations

import pytest

from engine import Completion
from engine.messages import TokenLogprobs
from loadtest.bench.crowd import Seen

ALONE = Completion([1], [5, 6], "ab", [TokenLogprobs(-1.0, []), TokenLogprobs(-2.0, [])], None)
SAME = [(0, 5, -1.0), (1, 6, -2.0)]


@pytest.mark.parametrize(
    ("seen", "difference"),
    [
        (Seen(SAME, "ab", "done"), None),
        (Seen(SAME[:1], "a", "left"), None),
        (Seen([], "", "left"), None),
        (Seen(SAME[:1], "a", "done"), "ended by None after 1 of 2"),
        (Seen(SAME, "ac", "done"), "text differs"),
        (Seen(SAME[:1], "x", "left"), "text differs"),
        (Seen([(0, 5, -1.0), (1, 7, -2.0)], "ab", "done"), "tokens or log-prob"),
        (Seen([(0, 5, -1.0000001)], "a", "left"), "tokens or log-prob"),
        (Seen([SAME[1]], "b", "left"), "tokens or log-prob"),
        (Seen([*SAME, SAME[1]], "abb", "done"), "tokens or log-prob|ended by"),
        (Seen(SAME, "ab", "done", "timeout"), "ended by timeout"),
        (Seen(SAME, "ab", "failed: poisoned_request"), "failed: poisoned_request"),
        (Seen(SAME[:1], "a"), "nothing came"),
    ],
)
def test_what_differs_from_the_run_alone(seen: Seen, difference: str | None) -> None:
    got = seen.difference(ALONE)
    if difference is None:
        assert got is None
    else:
        assert got is not None
        assert any(each in got for each in difference.split("|"))
