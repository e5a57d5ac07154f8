"""The journal tells the next process what this one died of."""

from __future__ import annotations

from pathlib import Path

from engine.execution.journal import StepJournal


def left(path: Path) -> tuple[dict[str, int], list[str]]:
    with StepJournal(path) as journal:
        return journal.suspects, journal.poisoned


def test_a_step_that_ended_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step"
    assert left(path) == ({}, [])
    with StepJournal(path) as journal:
        journal.begin({"a": 0, "b": 7}, alone=False)
        journal.end()
    assert left(path) == ({}, [])


def test_a_step_that_did_not_end_leaves_its_requests_once(tmp_path: Path) -> None:
    path = tmp_path / "step"
    with StepJournal(path) as journal:
        journal.begin({f"{at:040}": 10**9 for at in range(64)}, alone=False)
        journal.end()
        journal.begin({"a": 0, "é": 300}, alone=False)
    assert left(path) == ({"a": 0, "é": 300}, [])
    assert left(path) == ({}, [])


def test_a_suspect_that_died_alone_is_poisoned(tmp_path: Path) -> None:
    path = tmp_path / "step"
    with StepJournal(path) as journal:
        journal.begin({"a": 4}, alone=True)
    assert left(path) == ({}, ["a"])
    with StepJournal(path) as journal:
        journal.begin({"a": 4}, alone=False)  # the only one that ran, and not yet suspected
    assert left(path) == ({"a": 4}, [])
