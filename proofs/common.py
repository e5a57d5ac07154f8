"""What the proofs share. Standard library only."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"


class Failed(Exception):
    """The proof did not succeed; the message says where."""


def call(
    *command: str | Path,
    log: Path | None = None,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run to the end; what it printed. Raises Failed with its last lines."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise Failed(f"{shlex.join(map(str, command))}: status {done.returncode}\n{tail}")
    return done.stdout


def local_torch(folder: Path, version: str) -> Path | None:
    """PyTorch's CPU wheel in a new folder, where pip has it at hand without an index; else None.

    version: of the Python that it is for.
    """
    folder.mkdir(parents=True)
    try:
        call(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-index", "--no-deps",
            "--only-binary=:all:", f"--python-version={version}", f"--dest={folder}", TORCH,
        )  # fmt: skip
    except Failed:
        return None
    (wheel,) = folder.iterdir()
    return wheel


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def expect(what: str, holds: bool, found: object = "") -> None:
    """One line of the verdict. Raises Failed where it does not hold."""
    print(f"{'ok  ' if holds else 'FAIL'} {what}{f': {found}' if found != '' else ''}", flush=True)
    if not holds:
        raise Failed(what)
