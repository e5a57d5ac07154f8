"""Metrics: whole from any HTTP process; what dashboards and rules ask for exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.frontend.client import AsyncEngine
from server.metrics import Metrics
from tests.patience import PATIENCE
from tests.server.conftest import Served
from tests.server.fake_engine import byte_tokenizer
from tests.server.processes.test_serve import serve

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
NAME = re.compile(r"\bropeway_[a-z0-9_]+")


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_any_process_has_the_numbers_of_all(tiny_model_dir: Path) -> None:
    """Each connection picks a process; both must have been asked and both answer alike."""
    body = {"prompt": "the a", "max_tokens": 3, "stream": False, "ignore_eos": True}
    with serve(tiny_model_dir, "--api-workers", "2") as server:
        close = {"Connection": "close"}
        for _ in range(20):
            answer = httpx.post(
                f"{server.url}/generate",
                json=body,
                headers=close,
                timeout=PATIENCE,
                trust_env=False,
            )
            assert answer.status_code == 200
        in_a_row, end = 0, time.monotonic() + PATIENCE
        while in_a_row < 20:
            answer = httpx.get(
                f"{server.url}/metrics", headers=close, timeout=PATIENCE, trust_env=False
            )
            found = samples(answer.text)
            assert found["ropeway_requests_total{'outcome': 'length'}"] == 20
            assert found["ropeway_time_to_first_token_seconds_count"] == 20
            assert found["ropeway_request_generation_tokens_sum"] == 60
            assert found["ropeway_engine_ready"] == 1
            # What the engine counts each process hears with the step after, sooner or later.
            in_a_row = in_a_row + 1 if found["ropeway_generation_tokens_total"] == 60 else 0
            assert time.monotonic() < end


async def test_a_folder_that_prometheus_does_not_know_is_refused(tmp_path: Path) -> None:
    engine = AsyncEngine(byte_tokenizer(), f"ipc://{tmp_path / 'engine'}", max_queue=1)
    with pytest.raises(ValueError, match="PROMETHEUS_MULTIPROC_DIR"):
        Metrics(engine, tmp_path)
    await engine.close()


def asked_for() -> set[str]:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return set(NAME.findall("\n".join([*queries, (DEPLOY / "ropeway.rules.yml").read_text()])))


async def test_what_the_dashboard_and_the_rules_ask_for_exists(served: Served) -> None:
    text = (await served.http.get("/metrics")).text
    known = set(NAME.findall(text))
    assert len(asked_for()) > 20
    assert asked_for() - known == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_takes_the_configuration_and_the_exposition(served: Served) -> None:
    check = ["promtool", "check", "config", str(DEPLOY / "prometheus.yml")]
    result = subprocess.run(check, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    lint = subprocess.run(
        ["promtool", "check", "metrics"],
        input=served.service.metrics.exposition(),
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert lint.returncode in (0, 3), lint.stderr  # 3: naming advice
