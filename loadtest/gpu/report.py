"""What a check on a GPU comes to: every part tried, every failure said, one document at the end."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Checks that hold or not, and figures. An exception is a failure of its part only."""

    def __init__(self, about: dict[str, Any], only: str = "") -> None:
        """only: what a part's name must contain to be tried."""
        self._only = only
        self.about = about
        self.checks: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []

    def check(self, name: str, work: Callable[[], str]) -> None:
        """work returns a word on what it saw, or raises."""
        if self._only not in name:
            return
        begun = time.perf_counter()
        try:
            detail, passed = work(), True
        except Exception as error:
            detail, passed = self._failure(error), False
        seconds = round(time.perf_counter() - begun, 2)
        self.checks.append({"name": name, "passed": passed, "detail": detail, "seconds": seconds})
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail} ({seconds} s)", file=sys.stderr)

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """work returns figures by name, or raises."""
        if self._only not in name:
            return
        try:
            figures = work()
        except Exception as error:
            figures = {"error": self._failure(error)}
        self.figures.append({"name": name, **figures})
        print(f"---- {name}: {figures}", file=sys.stderr)

    @staticmethod
    def _failure(error: Exception) -> str:
        traceback.print_exception(error, limit=-6, file=sys.stderr)
        text = f"{type(error).__name__}: {error}"
        return text if len(text) < 500 else f"{text[:500]}..."

    @property
    def failed(self) -> int:
        """How many checks do not hold."""
        return sum(not each["passed"] for each in self.checks)

    def close(self, path: Path | None) -> None:
        """A table to standard error; the document to standard output, and to a file if given."""
        print("\nfigures", file=sys.stderr)
        for figure in self.figures:
            values = {key: value for key, value in figure.items() if key != "name"}
            text = ", ".join(f"{key} {value}" for key, value in values.items())
            print(f"  {figure['name']:<44} {text}", file=sys.stderr)
        print(f"{len(self.checks)} checks, {self.failed} failed", file=sys.stderr)
        for each in self.checks:
            if not each["passed"]:
                print(f"  FAIL {each['name']}: {each['detail']}", file=sys.stderr)
        document = {
            "command": "gpu-check",
            **self.about,
            "failed": self.failed,
            "checks": self.checks,
            "figures": self.figures,
        }
        text = json.dumps(document, indent=2, default=str)
        if path is not None:
            path.write_text(text + "\n")
        print(text, flush=True)
