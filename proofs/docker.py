"""Builds the Dockerfile without a Docker daemon, starts the image and tries it.

    python -m proofs.docker            # as root, on Debian, with buildah and debootstrap installed

debootstrap makes a base image, buildah builds on it (chroot isolation, vfs storage: no daemon, no
overlay file system). The image is then started by what its own configuration says (entry point,
command, user, environment), as process 1 of new process and mount namespaces, on a read-only root
with a /tmp in memory: what `docker run --read-only --tmpfs /tmp` does. Standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from proofs.common import ROOT, Failed, expect, free_port
from proofs.images import Buildah, Image, local_index, make_base

LIMIT_BYTES = 1_200_000_000
CUDA_NAMES = ("libcudart", "libcublas", "libcudnn", "libnccl", "libtorch_cuda", "nvidia_")
SERVES = "serves, is checked, drains and stops"
WORKS = {"cpu": SERVES, "cuda": SERVES, "loadtest": "loads a server and reports"}
START_SECONDS = 300.0
DRAIN_SECONDS = 1800


class Container:
    """A started image. Its process is number 1 inside."""

    def __init__(
        self,
        image: Image,
        port: int,
        log: Path,
        *arguments: str,
        writable: Sequence[str] = (),
        **volumes: Path,
    ) -> None:
        """arguments: in place of the image's CMD; volumes: by folder under the root, read-only
        unless they are named in writable.
        """
        self.port = port
        self._image = image
        self._user = str(image.config["User"])
        entry = Path(image.root)
        mounts = [
            f"mount --bind {entry} {entry}",
            f"mount -t proc proc {entry}/proc",
            f"mount --rbind /dev {entry}/dev",
            f"mount -t tmpfs -o mode=1777 tmpfs {entry}/tmp",
        ]
        for name, source in volumes.items():
            mounts.append(f"mount --bind {source} {entry}/{name}")
            if name not in writable:
                mounts.append(f"mount -o remount,bind,ro {entry}/{name}")
        mounts.append(f"mount -o remount,bind,ro {entry}")
        # Options as variables; a slow machine may take longer than 30 s to end a stream.
        ours = [f"ROPEWAY_SERVE_PORT={port}", f"ROPEWAY_SERVE_DRAIN_TIMEOUT={DRAIN_SECONDS}"]
        self._environment = [*image.environment, *ours]
        inside = ["env", "-i", *self._environment, *image.command(*arguments)]
        run = shlex.join(["chroot", f"--userspec={self._user}:{self._user}", str(entry), *inside])
        script = "set -e\n" + "\n".join(mounts) + f"\nexec {run}\n"
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._first_child()
        while not self._in_its_root and self._process.poll() is None:
            time.sleep(0.01)

    def _first_child(self) -> int:
        """The container's process 1, as seen from here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while self._process.poll() is None:
            if pids := children.read_text().split():
                return int(pids[0])
            time.sleep(0.01)
        raise Failed(f"it did not start:\n{self._log.read_text()}")

    @property
    def _in_its_root(self) -> bool:
        """Whether the mounts are made. Nothing is run inside to find out: to read a file there is
        to note when, and a root that is being written to cannot be made read-only."""
        try:
            return os.readlink(f"/proc/{self.pid}/root") != "/"
        except FileNotFoundError:  # it has ended
            return False

    def status_of(self, field: str) -> list[str]:
        """A line of process 1's /proc/.../status."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return rest.split()
        raise Failed(f"/proc/{self.pid}/status has no {field}")

    def execute(self, *command: str) -> int:
        """`docker exec`: the exit status of a command in the container."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        chroot = ["chroot", f"--userspec={self._user}:{self._user}", str(self._image.root)]
        return subprocess.run(
            [*enter, *chroot, "env", "-i", *self._environment, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode

    @property
    def healthy(self) -> bool:
        """What HEALTHCHECK says now."""
        return self.execute(*self._image.healthcheck) == 0

    def wait_healthy(self) -> float:
        """Seconds until HEALTHCHECK succeeded."""
        began = time.monotonic()
        while not self.healthy:
            if self._process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise Failed(f"not healthy:\n{self._log.read_text()}")
            time.sleep(0.2)
        return time.monotonic() - began

    def post(self, **body: object) -> http.client.HTTPResponse:
        """POST /generate."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        connection.request(
            "POST", "/generate", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection.getresponse()

    def terminate(self) -> None:
        """SIGTERM to process 1, as `docker stop`."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(DRAIN_SECONDS + 10)

    def kill(self) -> None:
        """However it stands."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait(10)


@contextmanager
def started(
    image: Image, log: Path, *arguments: str, writable: Sequence[str] = (), **volumes: Path
) -> Iterator[Container]:
    """A container on a free port, gone afterwards. As Container has it."""
    container = Container(image, free_port(), log, *arguments, writable=writable, **volumes)
    try:
        yield container
    finally:
        container.kill()


def try_image(image: Image, work: Path) -> None:
    """Everything that the Dockerfile promises. Raises Failed."""
    with started(image, work / "server.log") as server:
        expect("HEALTHCHECK fails while the model loads", not server.healthy)
        expect("HEALTHCHECK succeeds once ready", True, f"after {server.wait_healthy():.1f} s")
        expect("the server is process 1", server.status_of("NSpid")[-1] == "1")
        uids = set(server.status_of("Uid"))
        expect("it is not root", uids == {"1000"}, f"uid {', '.join(uids)}")
        expect("its root is read-only", server.execute("touch", "/home/ropeway/x") != 0)
        expect("its /tmp is not", server.execute("touch", "/tmp/x") == 0)
        answer = json.load(server.post(prompt="The old captain", max_tokens=8, stream=False))
        expect("a request is answered", answer["usage"]["completion_tokens"] == 8, answer["text"])
        stream = server.post(prompt="The old captain", max_tokens=800, ignore_eos=True)
        head = stream.readline() + stream.readline()
        server.terminate()
        deadline = time.monotonic() + START_SECONDS
        while server.healthy and time.monotonic() < deadline:
            time.sleep(0.02)
        refused = server.post(prompt="x", max_tokens=1).status
        expect("SIGTERM: new requests are refused while draining", refused == 503, refused)
        rest = head + stream.read()
        tokens, done = rest.count(b"event: token"), rest.count(b"event: done")
        expect("SIGTERM: the open stream goes on to its end", (tokens, done) == (800, 1), tokens)
        status = server.wait()
        expect("SIGTERM: the exit status is 0", status == 0, status)
    # As if the user's: another folder, not the one in the package.
    model = work / "model"
    shutil.copytree(ROOT / "weights" / "default", model)
    (image.root / "model").mkdir()  # docker makes the mount point
    with started(image, work / "volume.log", "serve", "/model", model=model) as server:
        server.wait_healthy()
        answer = json.load(server.post(prompt="The", max_tokens=4, stream=False))
        expect("a model from a volume is served", answer["usage"]["completion_tokens"] == 4)
        server.terminate()
        status = server.wait()
        expect("it stops when idle", status == 0, f"status {status}")


class Played(BaseHTTPRequestHandler):
    """As much of a server as the load test asks of one: two tokens, and the end."""

    MODELS = b'{"data": [{"id": "played", "max_model_len": 1024}]}'
    TOKEN = b"event: token\ndata: {}\n\n"
    STREAM = 2 * TOKEN + b'event: done\ndata: {"usage": {"cached_tokens": 0}}\n\n'

    def do_GET(self) -> None:
        """/ready and /v1/models."""
        self._answer(self.MODELS)

    def do_POST(self) -> None:
        """/tokenize and /generate."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.STREAM if self.path == "/generate" else b'{"token_ids": [1, 2, 3]}')

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def try_loadtest(image: Image, work: Path) -> None:
    """Load a server that is only played, with two Locust workers. Raises Failed."""
    played = ThreadingHTTPServer(("127.0.0.1", 0), Played)
    threading.Thread(target=played.serve_forever, daemon=True).start()
    report = work / "report"
    report.mkdir()
    report.chmod(0o777)
    (image.root / "report").mkdir()
    host = f"http://127.0.0.1:{played.server_address[1]}"
    load = "--scenario steady --rate 20 --start-rate 20 --seconds 1 --warmup 0 --workers 2"
    arguments = ["--host", host, "--out", "/report", *load.split()]
    log = work / "loadtest.log"
    with started(image, log, *arguments, writable=("report",), report=report) as container:
        status = container.wait()
        expect(
            "a load test ends within its bounds", status == 0, f"status {status}\n{log.read_text()}"
        )
    played.shutdown()
    size = (report / "index.html").stat().st_size
    expect("its report is there", "All bounds" in (report / "index.html").read_text(), size)


def prove(work: Path, targets: Sequence[str], suite: str) -> None:
    """Build and try each target on one base image. Raises Failed."""
    buildah = Buildah(work)
    timed = Stopwatch()
    base = make_base(buildah, work, suite)
    timed("debootstrap made the base image")
    container = buildah("from", base)
    root = Path(buildah("mount", container))
    version = next(path.name for path in (root / "usr/lib").glob("python3.*")).removeprefix(
        "python"
    )
    buildah("rm", container)
    wheels = local_index(work, version) if "cpu" in targets else None
    for target in targets:
        options: list[str | Path] = ["--build-arg", f"BASE={base}"]
        if target == "cpu" and wheels is not None:
            options += ["--build-arg", "TORCH_INDEX=file:///wheels"]
            options += ["--volume", f"{wheels}:/wheels:ro"]
        name = f"localhost/ropeway:{target}"
        buildah(
            "build", "--isolation", "chroot", "--format", "docker", "--layers=false",
            "--target", target, *options, "--tag", name, ".",
            log=work / f"build-{target}.log",
        )  # fmt: skip
        timed(f"buildah built the Dockerfile's target {target}")
        config = json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]
        image = Image(Path(buildah("mount", buildah("from", name))), config)
        size = image.size
        if target == "cuda":
            expect("the image was built", True, f"{size / 1e6:,.0f} MB without weights")
        else:
            below = f"{size / 1e6:,.0f} MB of {LIMIT_BYTES / 1e6:,.0f} MB without weights"
            expect("the image is small", size < LIMIT_BYTES, below)
            found = image.files(*CUDA_NAMES)
            expect("no CUDA library is in it", not found, ", ".join(found))
        folder = work / target
        folder.mkdir()
        (try_loadtest if target == "loadtest" else try_image)(image, folder)
        buildah.remove(name)


class Stopwatch:
    """Says what took how long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def __call__(self, what: str) -> None:
        """what: has just ended."""
        now = self._clock()
        print(f"     {what} in {now - self._last:.0f} s", flush=True)
        self._last = now


def main(arguments: Sequence[str] | None = None) -> int:
    """0: proved; 1: not; 2: cannot be tried here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target",
        choices=("cpu", "loadtest", "cuda"),
        action="append",
        help="may be repeated; cpu and loadtest where none is given",
    )
    parser.add_argument("--suite", default="bookworm", help="Debian's, for the base image")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="gigabytes of room")
    parser.add_argument("--keep", action="store_true", help="leave the folder with image and logs")
    options = parser.parse_args(arguments)
    targets = options.target or ["cpu", "loadtest"]
    lacking = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if lacking or os.geteuid() != 0:
        print(f"needs root and: apt-get install {' '.join(lacking)}", file=sys.stderr)
        return 2
    work = Path(tempfile.mkdtemp(prefix="ropeway-docker-", dir=options.work))
    try:
        prove(work, targets, options.suite)
    except Failed as failure:
        print(f"not proved: {failure}", file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"     left in {work}")
        else:
            Buildah(work).remove_all()
            shutil.rmtree(work)
    done = ", ".join(f"{target} {WORKS[target]}" for target in targets)
    print(f"proved: the Dockerfile builds, and its images work: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
