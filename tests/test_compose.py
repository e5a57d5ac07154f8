"""compose.yaml: what it names exists and fits together; real Prometheus answers the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.patience import PATIENCE
from tests.server.processes.test_serve import serve

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
STAGES = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M))
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def mounts(service: str) -> dict[str, str]:
    """What is mounted, by the path in the container."""
    found = {}
    for volume in SERVICES[service].get("volumes", []):
        source, target, *_ = volume.split(":")
        found[target] = source
    return found


def stage(service: str, folder: Path) -> Path:
    """The service's mounted files, laid out under a folder as the container sees them."""
    for target, source in mounts(service).items():
        if source.startswith("./deploy"):
            copy = folder / target.removeprefix("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, copy)
    return folder


def test_the_profiles() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert profiles == {
        "ropeway": [],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "loadtest": ["loadtest"],
    }


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_exists(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        assert service["build"]["target"] in STAGES
    else:  # a version and not whatever is the latest
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    for source in mounts(name).values():
        if source.startswith("./deploy"):
            assert (ROOT / source).is_file(), source
        elif source.startswith("./"):  # made by Docker, and not by accident in git
            assert source.removeprefix("./") + "/" in (ROOT / ".gitignore").read_text().split()
        else:
            assert source in COMPOSE["volumes"]
    assert set(service.get("depends_on", [])) <= set(SERVICES)


def test_nothing_open_has_more_rights_or_listeners_than_it_needs() -> None:
    for name, service in SERVICES.items():
        if name != "loadtest":
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
    assert SERVICES["ropeway"]["read_only"] is True
    assert SERVICES["ropeway"]["tmpfs"] == ["/tmp"]
    for name in ("prometheus", "grafana"):  # they ask for no password
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_the_load_test_waits_for_a_healthy_server() -> None:
    assert SERVICES["loadtest"]["depends_on"] == {"ropeway": {"condition": "service_healthy"}}
    runtime = (ROOT / "Dockerfile").read_text().partition("AS runtime")[2]
    assert "HEALTHCHECK --interval" in runtime
    (port,) = SERVICES["ropeway"]["ports"]
    assert f"--host http://ropeway:{port.rpartition(':')[2]} " in SERVICES["loadtest"]["command"]
    folder = SERVICES["loadtest"]["command"].partition("--out ")[2]
    assert folder in mounts("loadtest")


def test_prometheus_scrapes_the_server_as_outside_compose() -> None:
    inside = yaml.safe_load((ROOT / "deploy" / "compose" / "prometheus.yml").read_text())
    outside = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    (scrape,) = inside["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["ropeway:8000"]}]
    outside["scrape_configs"][0]["static_configs"] = scrape["static_configs"]
    assert inside == outside


def test_grafana_finds_prometheus_and_the_dashboard(tmp_path: Path) -> None:
    etc = stage("grafana", tmp_path) / "etc" / "grafana"
    (source,) = yaml.safe_load((etc / "provisioning/datasources/ropeway.yml").read_text())[
        "datasources"
    ]
    (port,) = SERVICES["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{port.rpartition(':')[2]}"
    scraped = yaml.safe_load((ROOT / "deploy" / "compose" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]
    (provider,) = yaml.safe_load((etc / "provisioning/dashboards/ropeway.yml").read_text())[
        "providers"
    ]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"])
    assert json.loads((tmp_path / home.removeprefix("/")).read_text())["uid"] == "ropeway"
    variable = DASHBOARD["templating"]["list"][0]
    assert (variable["type"], variable["query"]) == ("datasource", source["type"])


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not here")
def test_compose_takes_it() -> None:
    command = ["docker-compose", "-f", str(ROOT / "compose.yaml")]
    command += ["--profile", "monitoring", "--profile", "loadtest", "config", "--services"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert set(shown.stdout.split()) == set(SERVICES)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_every_query_of_the_dashboard(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With the files of compose.yaml; only the names of hosts, and how often it scrapes, differ."""
    etc = stage("prometheus", tmp_path) / "etc" / "prometheus"
    config = etc / "prometheus.yml"
    checked = subprocess.run(
        ["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "4 rules found" in checked.stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with serve(tiny_model_dir) as server:
        text = config.read_text().replace("ropeway:8000", server.url.removeprefix("http://"))
        config.write_text(text.replace("scrape_interval: 5s", "scrape_interval: 250ms"))
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
             f"--web.listen-address={address}"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for_queries(server.url, f"http://{address}")
        finally:
            prometheus.terminate()
            prometheus.wait(PATIENCE)


def wait_for_queries(server: str, prometheus: str) -> None:
    """Ask the server now and then, until each query has found a number."""
    body = {"prompt": "the a", "max_tokens": 8, "stream": False, "ignore_eos": True}
    waiting = {query.replace("$__rate_interval", "5s") for query in QUERIES}
    deadline = time.monotonic() + PATIENCE
    with httpx.Client(trust_env=False, timeout=PATIENCE) as http:
        while waiting and time.monotonic() < deadline:
            assert http.post(f"{server}/generate", json=body).status_code == 200
            time.sleep(0.25)
            for query in sorted(waiting):
                try:
                    answer = http.get(f"{prometheus}/api/v1/query", params={"query": query}).json()
                except httpx.ConnectError:  # it is not up yet
                    break
                assert answer["status"] == "success", (query, answer)
                values = [float(each["value"][1]) for each in answer["data"]["result"]]
                if values and all(value >= 0 for value in values):  # NaN is not
                    waiting.remove(query)
    assert waiting == set()
