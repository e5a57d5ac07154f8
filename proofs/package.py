"""Builds sdist and wheel, installs them in a clean environment, and serves from an empty folder.

    python -m proofs.package           # with `build` installed

The wheel is made from the sdist, so both must be whole. The environment is new, holds what
locks/cpu.txt names and nothing else, and knows nothing of the checkout.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from proofs.common import ROOT, TORCH, Failed, call, expect, free_port, local_torch

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
ROOMS = ("engine", "server", "weights", "loadtest")
START_SECONDS = 60.0
TYPED = """
from engine import LLM, SamplingParams
llm = LLM("weights/default")
reveal_type(llm.generate(["a"], SamplingParams(max_tokens=1))[0].text)
"""


def prove(work: Path, torch_index: str) -> None:
    """Build, install, serve. Raises Failed."""
    distributions = work / "dist"
    call(sys.executable, "-m", "build", "--outdir", distributions, ROOT, log=work / "build.log")
    (sdist,) = distributions.glob("*.tar.gz")
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expect("sdist and wheel are built", True, f"{sdist.name}, {wheel.name}")
    typed = [room for room in ROOMS if f"{room}/py.typed" in names]
    expect("py.typed is in every package", typed == list(ROOMS), ", ".join(typed))
    kernels = [name for name in names if name.endswith(".so")]
    expect("the compiled kernel is in the wheel", len(kernels) == 1, ", ".join(kernels))
    expect("the shipped weights are", "weights/default/model.safetensors" in names)

    call(sys.executable, "-m", "venv", work / "venv")
    binaries = work / "venv" / "bin"
    # -I: whatever PYTHONPATH says, what is in the checkout is not installed.
    pip = (binaries / "python", "-I", "-m", "pip", "--disable-pip-version-check")
    torch = local_torch(work / "torch", ".".join(map(str, sys.version_info[:2])))
    source = [str(torch)] if torch else ["--index-url", torch_index, TORCH]
    call(*pip, "install", "--no-deps", *source)
    call(*pip, "install", "--no-deps", "--require-hashes", "-r", ROOT / "locks" / "cpu.txt")
    call(*pip, "install", "--no-deps", wheel)
    expect("the lock is complete", "No broken" in call(*pip, "check"))

    empty = work / "empty"
    empty.mkdir()
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(empty)}
    version = call(binaries / "ropeway", "--version", cwd=empty, env=environment).strip()
    expect("it runs outside the checkout", version.startswith("ropeway "), version)
    (empty / "typed.py").write_text(TYPED)
    seen = call(
        sys.executable, "-m", "mypy", "--strict", "--python-executable", binaries / "python",
        "typed.py", cwd=empty, env=environment,
    )  # fmt: skip
    expect("its types are seen by others", 'Revealed type is "' in seen and "str" in seen)
    serve(empty, binaries / "ropeway", environment)


def serve(folder: Path, ropeway: Path, environment: dict[str, str]) -> None:
    """Start it, ask it, stop it. Raises Failed."""
    port = free_port()
    process = subprocess.Popen(
        [str(ropeway), "serve", "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while ask(port, "GET", "/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"not ready: status {process.poll()}")
            time.sleep(0.2)
        status, body = ask(port, "POST", "/generate", prompt="The", max_tokens=8, stream=False)
        expect("it serves", status == 200, json.loads(body)["text"] if status == 200 else status)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=30)
        expect("the compiled kernel is used", "attention  cpu-" in shown)
        expect("it stops", process.returncode == 0, f"status {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ask(port: int, method: str, path: str, **body: object) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with suppress(OSError):
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    return 0, b""


def main(arguments: Sequence[str] | None = None) -> int:
    """0: proved; 1: not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", default=TORCH_INDEX, help="where pip has no wheel itself")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="ropeway-package-"))
    try:
        prove(work, options.torch_index)
    except Failed as failure:
        print(f"not proved: {failure}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work)
    print("proved: the distributions install and serve on their own")
    return 0


if __name__ == "__main__":
    sys.exit(main())
