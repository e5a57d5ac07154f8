"""Locust users that stream: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8000`.

A user is a source of requests, not a client that waits for its answer: it sends `--source-rate`
requests a second whatever becomes of them (an open loop, so a slow server is not spared). N users
together are a source of N times that rate, over any number of workers.

Locust's statistics get four kinds of entries for each request: POST (the whole; its length is the
number of tokens), TTFT (time to first token), ITL (each inter-token gap) and TOKENS/S (tokens a
second of this reader, in the column of milliseconds). Failures carry the server's error code. The
event `environment.events.generation` has the Generation itself; `--records FILE` keeps them all.
"""

from __future__ import annotations

import json
import math
import random
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.event import EventHook
from locust.runners import MasterRunner, WorkerRunner

from loadtest.load.address import Address
from loadtest.load.scenarios import SCENARIOS
from loadtest.load.stream import Client, Generation

POOL_TEXT = (
    "The old captain looked over the grey water and said that the wind would turn before night. "
    "Nobody answered him; the boys were busy with the ropes, and the cook had lost his knife. "
    "How far is it to the harbour, asked the youngest, and will there be letters for us? "
)
"""Prompts are drawn from its tokens: valid in any vocabulary that can spell it."""


class StreamFailed(Exception):
    """For Locust's table of failures: HTTP status and code."""


class Records:
    """All Generations of a run, and its end.

    A worker sends its Generations with its reports; the master keeps them. With `--load-seconds`
    the run ends when all requests that were sent by then have ended: Locust's own `--run-time` does
    not wait for what its workers still have open, which would hide the slowest answers.
    """

    def __init__(self, environment: Environment) -> None:
        """environment: of this process, whose runner exists already."""
        self._environment = environment
        self._runner = environment.runner
        self._kept: list[dict[str, Any]] = []
        self._open = 0
        self._closes = math.inf
        self._ended: set[str] = set()
        hooks = environment.events
        generation = EventHook()
        generation.add_listener(self._keep)
        hooks.generation = generation  # type: ignore[attr-defined]  # how Locust has custom events
        hooks.test_start.add_listener(self._start)
        hooks.test_stopping.add_listener(self._stop)
        if isinstance(self._runner, WorkerRunner):
            hooks.report_to_master.add_listener(self._send)
        elif isinstance(self._runner, MasterRunner):
            hooks.worker_report.add_listener(self._receive)

    def open(self, at: float) -> bool:
        """Whether a request that comes at a time (of time.time()) is to be sent, however late.
        If so, the run does not end before close() was called for it."""
        taken = at < self._closes
        self._open += taken
        return taken

    def close(self) -> None:
        """A request has ended."""
        self._open -= 1

    @property
    def _ended_here(self) -> bool:
        return time.time() >= self._closes and not self._open

    def write(self, path: Path) -> None:
        """JSON, in the order of arrival."""
        path.write_text(json.dumps(sorted(self._kept, key=lambda kept: kept["at"])))

    def _keep(self, generation: Generation) -> None:
        self._kept.append(asdict(generation))

    def _send(self, client_id: str, data: dict[str, Any]) -> None:
        data["generations"], self._kept = self._kept, []
        data["ended"] = self._ended_here

    def _receive(self, client_id: str, data: dict[str, Any]) -> None:
        self._kept += data.get("generations", [])
        if data.get("ended"):
            self._ended.add(client_id)

    def _start(self, **_: object) -> None:
        options = self._environment.parsed_options
        assert options is not None
        self._closes = time.time() + options.load_seconds if options.load_seconds else math.inf
        self._ended.clear()
        if options.load_seconds and not isinstance(self._runner, WorkerRunner):
            gevent.spawn(self._quit_at_the_end)

    def _stop(self, **_: object) -> None:
        self._closes = 0.0

    def _quit_at_the_end(self) -> None:
        while not self._all_ended():
            gevent.sleep(0.1)
        assert self._runner is not None
        self._runner.quit()

    def _all_ended(self) -> bool:
        if isinstance(self._runner, MasterRunner):
            return len(self._ended) >= self._runner.worker_count
        return self._ended_here


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Ours beside Locust's."""
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="steady")
    parser.add_argument("--source-rate", type=float, default=1.0, help="requests/s of each user")
    parser.add_argument("--context", type=int, default=1024, help="the model's, in tokens")
    parser.add_argument(
        "--silence", type=float, default=60.0, help="seconds until a stream is given up"
    )
    parser.add_argument(
        "--load-seconds", type=float, default=0.0, help="send for so long; 0: until stopped"
    )
    parser.add_argument("--api-key", default="", is_secret=True, help="sent with every request")
    parser.add_argument("--ssl-cafile", default="", help="certificates to trust, for https://")
    parser.add_argument("--load-seed", type=int, default=0)
    parser.add_argument(
        "--records", help="write every request here, as JSON", include_in_web_ui=False
    )


@events.init.add_listener
def prepare(environment: Environment, **_: object) -> None:
    """Collect what the users see, and write it at the end."""
    records = Records(environment)
    environment.records = records  # type: ignore[attr-defined]  # for users to find; Locust passes nothing else
    path = environment.parsed_options.records if environment.parsed_options else None
    if path and not isinstance(environment.runner, WorkerRunner):
        environment.events.quitting.add_listener(lambda **_: records.write(Path(path)))


class Source(User):
    """Sends requests of `--scenario` at `--source-rate`."""

    _started = 0

    def on_start(self) -> None:
        """Learn the server's token ids."""
        options: Namespace = self.environment.parsed_options
        self._scenario = SCENARIOS[options.scenario]
        self._rate, self._context = options.source_rate, options.context
        if self._rate <= 0:
            raise ValueError(f"--source-rate must be greater than 0, got {self._rate:g}")
        self._records: Records = self.environment.records
        cafile = Path(options.ssl_cafile) if options.ssl_cafile else None
        address = Address(str(self.host), options.api_key or None, cafile)
        self._client = Client(address, options.silence)
        worker = getattr(self.environment.runner, "worker_index", 0)
        self._rng = random.Random(f"{options.load_seed}.{worker}.{Source._started}")
        Source._started += 1
        self._requests = Group()
        self._next = time.time()
        self._pool = self._client.token_ids(POOL_TEXT)
        self._draw()

    def _draw(self) -> None:
        """The next arrival. One that comes before the end is sent, also where we are late."""
        self._next = self._scenario.arrivals.next(self._next, self._rate, self._rng)
        self._sends = self._records.open(self._next)

    @task
    def arrive(self) -> None:
        """Wait for the next arrival and start its request; nobody waits for its end."""
        gevent.sleep(max(0.0, self._next - time.time()))
        if self._sends:
            self._requests.spawn(self._request, self._next)
        self._draw()

    def on_stop(self) -> None:
        """Let what was sent end: what a slow server has not answered yet counts most."""
        self._requests.join()

    def _request(self, at: float) -> None:
        plan = self._scenario.plan(self._rng, self._pool, self._context)
        generation = Generation(self._scenario.name, at, len(plan.prompt))
        try:
            self._client.run(generation, plan.prompt, plan.max_tokens, plan.leaves_after)
            self._fire(generation)
        finally:
            self._records.close()

    def _fire(self, generation: Generation) -> None:
        hooks, name = self.environment.events, generation.scenario
        exception = None
        if generation.failed:
            exception = StreamFailed(f"{generation.status} {generation.outcome}")

        def fire(kind: str, value: float, length: int = 0) -> None:
            hooks.request.fire(
                request_type=kind,
                name=name,
                response_time=value,
                response_length=length,
                exception=exception if kind == "POST" else None,
                context={},
            )

        fire("POST", 1000 * generation.total, generation.tokens)
        if generation.first is not None:
            fire("TTFT", 1000 * generation.first)
        for gap in generation.gaps:
            fire("ITL", 1000 * gap)
        if generation.tokens_per_s is not None:
            fire("TOKENS/S", generation.tokens_per_s)
        hooks.generation.fire(generation=generation)
