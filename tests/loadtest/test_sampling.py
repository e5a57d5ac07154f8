"""The comparison of ways to draw runs and prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys

from loadtest.sampling import CASES


def test_the_command_prints_json() -> None:
    options = ["--repeats", "1", "--rows", "1,3", "--vocab-size", "300"]
    command = [sys.executable, "-m", "loadtest.sampling", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout)["results"]
    assert [(row["case"], row["rows"]) for row in results] == [
        (name, rows) for rows in (1, 3) for name in CASES
    ]
    assert all(row[way]["median"] > 0 for row in results for way in ("kernel_ms", "torch_ms"))
