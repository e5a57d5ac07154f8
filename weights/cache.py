"""Checkpoints that are converted when they are served, and kept for the next time. No torch here.

    CACHE/PATH-STATE/NAME          the model directory
    CACHE/PATH-STATE/summary.json  what was done, and how it was known

PATH stands for where the checkpoint lies. STATE stands for everything that the result depends on:
names, sizes and times of its files, what the user declared, the text, and the converter's code. So
a checkpoint that was trained on is converted anew. An entry appears whole, by a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from engine.errors import CheckpointError
from engine.files import read_json
from weights.files import checkpoint_files, read_header, weights_file
from weights.summary import Summary, found, show

SUMMARY_FILE = "summary.json"
PARTIAL = ".partial"
FORGOTTEN_SECONDS = 24 * 3600.0
"""After so long a partial entry is that of a process that was killed."""

STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Wanted:
    """A checkpoint and what the user says of it. text: a file; declared: NAME=VALUE."""

    path: Path
    text: Path | None = None
    declared: Sequence[str] = ()


def is_model_directory(path: Path) -> bool:
    """Whether it is one of ours that says how it was rotated. Raises CheckpointError."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    weights = weights_file(path)
    if weights.name.endswith(".index.json"):
        names = read_json(weights).get("weight_map") or {}
    else:
        try:
            names, _ = read_header(weights)
        except CheckpointError:
            return False  # the converter says what is wrong with it
    return "blocks.0.qkv.weight" in names and "rotary_dim" in read_json(path / "config.json")


def servable(wanted: Wanted, cache: Path, console: Console) -> Path:
    """A model directory of ours: the path itself, or what it was converted to, now or before.

    console: where is told what was done. Raises CheckpointError; KeyboardInterrupt leaves nothing.
    """
    if is_model_directory(wanted.path):
        if wanted.declared or wanted.text is not None:
            raise CheckpointError(
                f"{wanted.path}: a model directory says everything itself; --set and --text are "
                "for checkpoints of other formats"
            )
        return wanted.path
    path, state = _key(wanted)
    entry = cache.absolute() / f"{path}-{state}"
    summary = _read(entry)
    if summary is not None:
        console.print(
            f"{wanted.path}: converted before, to {summary.directory}; {found(summary)}",
            soft_wrap=True,
            highlight=False,
        )
    else:
        console.print(f"{wanted.path}: converting to {entry}", soft_wrap=True, highlight=False)
        summary = _convert(wanted, entry)
        show(summary, console)
    older = sorted(e for e in entry.parent.glob(f"{path}-*") if e != entry and _read(e))
    if older:
        size = sum(file.stat().st_size for each in older for file in each.rglob("*"))
        console.print(
            f"older conversions of it take {size / 1e6:,.1f} MB: rm -r {' '.join(map(str, older))}",
            soft_wrap=True,
            highlight=False,
        )
    return Path(summary.directory)


def _key(wanted: Wanted) -> tuple[str, str]:
    """What stands for the path, and for the state of everything else. Raises CheckpointError."""
    files = checkpoint_files(wanted.path)
    code = sorted(Path(__file__).parent.rglob("*.py"))
    try:
        stats = [(str(file.resolve()), file.stat()) for file in files]
        text = b"" if wanted.text is None else wanted.text.read_bytes()
        converter = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    state = {
        # ctime too: a copy may keep the time of what it overwrites, but not this one.
        "files": [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats],
        "declared": sorted(wanted.declared),
        "text": hashlib.sha256(text).hexdigest() if wanted.text is not None else "",
        "converter": converter,
    }
    return _digest(str(wanted.path.resolve()))[:8], _digest(json.dumps(state))[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _read(entry: Path) -> Summary | None:
    """The summary of an entry; None where there is none."""
    try:
        return msgspec.json.decode((entry / SUMMARY_FILE).read_bytes(), type=Summary)
    except (OSError, msgspec.MsgspecError):
        return None


def _convert(wanted: Wanted, entry: Path) -> Summary:
    """Make the entry, in another process. Raises CheckpointError."""
    path = wanted.path.resolve()
    name = path.name if path.is_dir() else path.stem
    partial = entry.with_name(f"{entry.name}.{os.getpid()}{PARTIAL}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        for each in entry.parent.glob(f"*{PARTIAL}"):
            if time.time() - each.stat().st_mtime > FORGOTTEN_SECONDS:
                shutil.rmtree(each, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{entry.parent}: cannot be written: {error.strerror}; name another directory for "
            "conversions (--cache-dir)"
        ) from error
    job = {
        "source": str(wanted.path),
        "folder": str(partial),
        "name": name,
        "text": None if wanted.text is None else str(wanted.text),
        "declared": list(wanted.declared),
    }
    try:
        summary = _run(json.dumps(job))
        summary = msgspec.structs.replace(summary, directory=str(entry / name))
        if entry.name != "-".join(_key(wanted)):
            raise CheckpointError(f"{wanted.path}: changed while it was converted; start again")
        (partial / SUMMARY_FILE).write_bytes(msgspec.json.encode(summary))
        # Another server may have been faster, with the same result.
        if _read(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
    except OSError as error:
        if _read(entry) is None:
            raise CheckpointError(f"{entry}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _run(job: str) -> Summary:
    """What `python -m weights.job` makes of it. Raises CheckpointError."""
    # In a group of its own: a Ctrl-C reaches us, and the end of its input tells it to clean up.
    command = [sys.executable, "-P", "-m", "weights.job"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.read()
        status = process.wait()
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    if status != 0:
        hint = "; perhaps memory ran out" if status == -9 else ""
        raise CheckpointError(f"the conversion ended with status {status}{hint}")
    outcome = json.loads(answer)
    if outcome["error"]:
        raise CheckpointError(outcome["error"])
    return msgspec.convert(outcome["summary"], Summary)
