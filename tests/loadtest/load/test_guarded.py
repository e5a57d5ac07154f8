"""The load test against `ropeway serve` with API keys and over HTTPS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trustme
from typer.testing import CliRunner

from server.access.keys import new_key
from server.cli import app
from tests.patience import PATIENCE
from tests.server.processes.test_serve import serve

SHORT = ["--scenario", "steady", "--rate", "8", "--start-rate", "8", "--seconds", "1"]
SHORT += ["--warmup", "0.5"]
LENIENT = ("60000", "60000")
ALICE, ALICE_KEY = new_key("alice", None, None)


@dataclass(frozen=True)
class Guarded:
    """A server that asks for a key, and whoever vouches for it."""

    url: str
    cafile: Path


@pytest.fixture(scope="module")
def guarded(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(folder / "chain.pem"), append=True)
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    (folder / "keys").write_text(ALICE_KEY.line + "\n")
    options = ["--api-key-file", str(folder / "keys")]
    options += ["--ssl-certfile", str(folder / "chain.pem"), "--ssl-keyfile"]
    with serve(tiny_model_dir, *options, str(folder / "key.pem")) as server:
        assert server.url.startswith("https://")
        yield Guarded(server.url, folder / "authority.pem")


def load(
    *arguments: str, key: str | None = None, bounds: tuple[str, str] = LENIENT
) -> tuple[int, str]:
    """Exit code, and what was shown, in one line. bounds: of TTFT and of gaps, in ms."""
    env = {} if key is None else {"ROPEWAY_LOADTEST_API_KEY": key}
    slo = ["--slo-ttft-ms", bounds[0], "--slo-itl-ms", bounds[1]]
    result = CliRunner().invoke(app, ["loadtest", *arguments, *SHORT, *slo], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_key_and_a_certificate_let_it_in(guarded: Guarded, tmp_path: Path, workers: str) -> None:
    options = ["--host", guarded.url, "--ssl-cafile", str(guarded.cafile), "--workers", workers]
    out = tmp_path / "report"
    code, shown = load(*options, "--api-key", ALICE, "--out", str(out))
    assert (code, shown.count("kept")) == (0, 2), shown
    outcomes = {line.split(",")[2] for line in (out / "requests.csv").read_text().split()[1:]}
    assert outcomes == {"ok"}
    for file in out.iterdir():
        assert ALICE not in file.read_text()


def test_the_key_may_come_by_the_environment(guarded: Guarded, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "report")]
    code, shown = load("--host", guarded.url, "--ssl-cafile", str(guarded.cafile), *out, key=ALICE)
    assert code == 0, shown


def test_without_a_key_nothing_is_measured(guarded: Guarded) -> None:
    code, shown = load("--host", guarded.url, "--ssl-cafile", str(guarded.cafile))
    assert code == 3
    assert "/v1/models: 401: " in shown
    assert "--api-key" in shown


def test_an_unknown_certificate_is_not_trusted(guarded: Guarded) -> None:
    code, shown = load("--host", guarded.url, "--api-key", ALICE)
    assert code == 3
    assert f"no server can be reached at {guarded.url}: " in shown
    assert "CERTIFICATE_VERIFY_FAILED" in shown


def test_no_list_of_processes_shows_the_key(guarded: Guarded, tmp_path: Path) -> None:
    """What is asked for by the environment is handed to Locust in a file that only we can read."""
    seen: list[list[str]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    seen.append(child.cmdline())
                except psutil.NoSuchProcess:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        out = ["--out", str(tmp_path / "report")]
        load("--host", guarded.url, "--ssl-cafile", str(guarded.cafile), *out, key=ALICE)
    finally:
        over.set()
        watching.join(PATIENCE)
    assert any("locust" in line for line in seen)
    assert not any(ALICE in word for line in seen for word in line)


def test_a_broken_bound_is_the_exit_code(guarded: Guarded, tmp_path: Path) -> None:
    options = ["--host", guarded.url, "--ssl-cafile", str(guarded.cafile), "--api-key", ALICE]
    out = tmp_path / "report"
    code, shown = load(*options, "--out", str(out), bounds=("0.001", "60000"))
    assert code == 1
    assert "ms > 0.001 ms" in shown
    assert "Not kept:" in (out / "index.html").read_text()
