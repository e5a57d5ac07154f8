"""Every command in the README is run, at toy size, or is listed with the proof that covers it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from server.cli import app
from tests.patience import PATIENCE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ELSEWHERE = {
    "git clone <this repository> ropeway && cd ropeway": "continuous integration begins so",
    "make test": "is what runs this",
    "docker build -t ropeway .": "make docker-proof",
    "docker run --rm -p 8000:8000 --read-only --tmpfs /tmp ropeway": "make docker-proof",
    "docker compose --profile monitoring up": "tests/test_compose.py, without Docker",
    "docker compose run --rm loadtest": "tests/test_compose.py; make docker-proof tries the image",
    "make docker-proof": "needs root and some minutes",
    "make chaos": "takes minutes; tests/loadtest/bench/test_chaos.py does a little of it",
}
"""Commands that no test can run, and what does."""

LOAD = (
    "--serve '--threads 1' --scenario steady --rate 8 --start-rate 8 --seconds 1.5 --warmup 0.5 "
    "--slo-ttft-ms 60000 --slo-itl-ms 60000"
)


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every block; indented ones have the language `indented`."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    without = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", without, re.MULTILINE)
    return [*fenced, *(("indented", re.sub("^    ", "", text, flags=re.M)) for text in indented)]


def commands() -> list[str]:
    """Lines of indented blocks, and what follows `$ ` in fenced ones; without their comments."""
    found = []
    for language, text in blocks():
        if language == "indented":
            lines = text.splitlines()
        else:
            lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return found


@dataclass
class Toy:
    """A folder whose `bin` stands for the virtual environment's; env: of every command."""

    folder: Path
    env: dict[str, str]

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Toy:
    """An environment that make takes for installed, and a tiny model for every command."""
    folder = tmp_path_factory.mktemp("readme")
    binaries = folder / "bin"
    binaries.mkdir()
    main = "from server.cli import main; main()"
    scripts = {
        "ropeway": f'exec {shlex.quote(sys.executable)} -P -c "{main}" "$@"',
        "pip": "exit 0",
    }
    for name, script in scripts.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    for stamp in (".created", ".torch", ".installed", ".dev"):
        (folder / stamp).touch()
    env = os.environ | {
        "VENV": str(folder),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ROPEWAY_SERVE_PORT": "0",
        "ROPEWAY_SERVE_THREADS": "1",
        "ROPEWAY_GENERATE_MODEL": str(tiny_model_dir),
        "ROPEWAY_GENERATE_THREADS": "1",
    }
    return Toy(folder, env)


@pytest.fixture(scope="module")
def server(toy: Toy, tiny_model_dir: Path) -> Iterator[str]:
    """`make serve`, as the README says; its address."""
    assert "make serve" in commands()
    process = subprocess.Popen(
        ["make", "serve"],
        cwd=ROOT,
        env=toy.env | {"MODEL": str(tiny_model_dir)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if found := re.search(r"url\s+http://(\S+)", line):
            break
    else:
        pytest.fail(f"make serve: {shown}")
    yield found[1]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE)


def test_every_command_is_known() -> None:
    """So that a new line in the README needs a line here."""
    runs = ("make serve", "make help", "make loadtest", "curl ", "ropeway ", "pip install ")
    for command in commands():
        assert command in ELSEWHERE or command.startswith(runs), command
    for command in ELSEWHERE:
        assert command in README, f"{command} is not in the README any more"


def test_curl(toy: Toy, server: str) -> None:
    found = [command for command in commands() if command.startswith("curl ")]
    assert found
    for command in found:
        assert "localhost:8000" in command
        shown = toy.run(command.replace("localhost:8000", server))
        assert "event: done" in shown


def test_make_help(toy: Toy) -> None:
    shown = toy.run("make help")
    for command in commands():
        if command.startswith("make "):
            assert f"  {command} " in shown


def test_make_loadtest(toy: Toy, tiny_model_dir: Path) -> None:
    assert "make loadtest" in commands()
    report = toy.folder / "report"
    load = f"{LOAD} --out {report}".replace("--serve '", f"--serve '{tiny_model_dir} ")
    toy.env["ARGS"] = load
    toy.run("make loadtest")
    assert "All bounds are kept" in (report / "index.html").read_text()
    assert len((report / "points.csv").read_text().splitlines()) == 2


def test_ropeway(toy: Toy, tiny_model_dir: Path) -> None:
    found = [command for command in commands() if command.startswith("ropeway ")]
    assert any(command.startswith("ropeway generate") for command in found)
    source, target = toy.folder / "source", toy.folder / "target"
    toy.run(f"ropeway convert {tiny_model_dir} {source} --to gpt-neox")
    for command in found:
        toy.run(command.replace("SRC", str(source)).replace("DST", str(target)))
    assert (target / "config.json").exists()


def test_python(toy: Toy) -> None:
    (text,) = [text for language, text in blocks() if language == "python"]
    script = toy.folder / "example.py"
    script.write_text(text)
    shown = toy.run(f"{shlex.quote(sys.executable)} {script}")
    assert shown.count(" length ") + shown.count(" stop ") == 2


def test_commands_in_sentences_exist() -> None:
    group = typer.main.get_command(app)
    for command in re.findall(r"`(ropeway [^`\n]+)`", README):
        words = command.split()[1:]
        if words[0] == "--install-completion":
            continue
        assert words[0] in group.commands, command  # type: ignore[attr-defined]  # of a typer group
        if words[0] == "bench" and len(words) > 1:
            shown = CliRunner().invoke(app, ["bench", words[1], "--help"])
            assert shown.exit_code == 0, command
    for command in re.findall(r"`(make [a-z-]+)`", README):
        assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text(), command
