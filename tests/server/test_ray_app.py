"""What is asked of Ray is what the settings say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

BUILD = """
import json
from ray.serve.config import AutoscalingConfig
from server import ray_app

asked = {}

def note(**values):
    asked.update(values)
    return AutoscalingConfig(**values)

ray_app.AutoscalingConfig = note
ray_app.build(dict(model="m", min_replicas=2, max_replicas=3, target_requests=4,
                   upscale_seconds=5, downscale_seconds=6))
print(json.dumps(asked))
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_autoscaling() -> None:
    """In another process: importing Ray warns, and takes long."""
    said = subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True)
    assert json.loads(said.stdout) == {
        "min_replicas": 2,
        "max_replicas": 3,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 5,
        "downscale_delay_s": 6,
    }
