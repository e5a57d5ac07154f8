"""What an experiment leaves: its figures, its picture, and on what they were measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weights.experiments.picture import Panel, draw


def machine() -> dict[str, Any]:
    """Where something was measured."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def write(folder: Path, name: str, document: Mapping[str, Any], panels: Sequence[Panel]) -> None:
    """NAME.json and NAME.svg, in a folder that is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    draw(panels, folder / f"{name}.svg")
