"""The comparison with the library runs and prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys

from loadtest.rotary import CASES


def test_the_command_prints_json() -> None:
    command = [sys.executable, "-m", "loadtest.rotary", "--repeats", "1", "--seconds", "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    document = json.loads(done.stdout)
    assert [row["name"] for row in document["results"]] == [case.name for case in CASES]
    for row in document["results"]:
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["ours_us"]["median"] > 0
