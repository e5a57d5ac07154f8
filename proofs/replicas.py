"""Two replicas on Ray Serve: one is killed under load, then all are replaced; no stream is lost.

    python -m proofs.replicas          # with the extras `ray` and `loadtest` installed

Also: what prefix-affinity routing does for the cache, and that load starts another replica. Streams
are compared token by token with those of an undisturbed run.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import ray
from ray import serve
from ray.util import list_named_actors

from loadtest.load.address import Address
from loadtest.load.scenarios import Lengths, Scenario
from loadtest.load.stream import OK, Client, Generation
from proofs.common import ROOT, Failed, expect, free_port
from server.ray_app import build

MODEL = str(ROOT / "weights" / "default")
STREAMS = 16
TOKENS = 200
BEGINNINGS = Scenario("prefix", "", prompt=Lengths(16, 0.5, 4), shared=64)
KV_MEMORY = 96 << 20
"""Of each replica: about 200 pages, where 64 beginnings of 256 tokens take 256."""


PORT = free_port()


@dataclass
class Seen:
    """A stream: who began it, its tokens, and how it ended."""

    replica: str = ""
    token_ids: list[int] = field(default_factory=list)
    end: str = ""


def read(number: int, seen: Seen) -> Seen:
    """Stream number `number`, into `seen` as it comes."""
    body = {"prompt": f"{number} captains", "max_tokens": TOKENS, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    content = json.dumps(body | {"seed": number})
    connection.request("POST", "/generate", content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    seen.replica = response.headers.get("X-Ropeway-Replica", "")
    for line in response:
        if line.startswith(b"event: "):
            seen.end = line[7:].decode().strip()
        elif line.startswith(b"data: ") and seen.end == "token":
            seen.token_ids.append(json.loads(line[6:])["token_id"])
    return seen


@dataclass
class Load:
    """STREAMS streams at once, on threads."""

    seen: list[Seen] = field(default_factory=lambda: [Seen() for _ in range(STREAMS)])

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(STREAMS)
        self._reading = [self._pool.submit(read, *each) for each in enumerate(self.seen)]
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._reading:
            each.result()
        self._pool.shutdown()

    def wait_for(self, tokens: int) -> None:
        """Until every stream has so many."""
        while any(len(each.token_ids) < tokens for each in self.seen):
            if any(each.done() for each in self._reading):
                return
            time.sleep(0.01)

    def check(self, reference: Load) -> None:
        """Raises Failed unless each stream is whole and as the reference's."""
        whole = sum(each.end == "done" and len(each.token_ids) == TOKENS for each in self.seen)
        expect("every stream is whole", whole == STREAMS, f"{whole} of {STREAMS}")
        pairs = zip(self.seen, reference.seen, strict=True)
        same = sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs)
        expect("and has the tokens of an undisturbed run", same == STREAMS, same)


def start(**settings: object) -> None:
    """Run the application, or replace the one that runs, and wait for it."""
    serve.run(build({"model": MODEL, "cpus": 0.5, **settings}), name="ropeway")


def replicas() -> dict[str, str]:
    """Names of living replicas' actors, by the name that answers carry."""
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return {name.rsplit("#", 1)[1]: name for name in names if "#EngineReplica#" in name}


def prove_failures() -> None:
    """One replica killed, then all of them replaced, each under load. Raises Failed."""
    start(min_replicas=2, max_replicas=2)
    with Load() as reference:
        pass
    whole = all(each.end == "done" for each in reference.seen)
    names = {each.replica for each in reference.seen}
    expect("two replicas share the load", whole and len(names) == 2, f"{len(names)} answered")

    with Load() as load:
        load.wait_for(20)
        victim = max(replicas(), key=lambda name: sum(s.replica == name for s in load.seen))
        lost = [len(s.token_ids) for s in load.seen if s.replica == victim]
        ray.kill(ray.get_actor(replicas()[victim], namespace="serve"))
    expect("a replica is killed with streams open", len(lost) > 0, f"{len(lost)} streams")
    load.check(reference)
    deadline = time.monotonic() + 60
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    expect("Ray starts another", len(replicas()) == 2)

    before = set(replicas())
    with Load() as load:
        load.wait_for(20)
        start(min_replicas=2, max_replicas=2, slack=9)
        after = set(replicas())
    expect("a rolling update replaces both", not before & after and len(after) == 2)
    load.check(reference)


def cached_share(routing: str) -> float:
    """Of the tokens of shared beginnings, those that were not computed again."""
    start(min_replicas=2, max_replicas=2, routing=routing, kv_memory=KV_MEMORY, max_num_seqs=8)
    client = Client(Address(f"http://127.0.0.1:{PORT}"), 60.0)
    pool = client.token_ids("The wind would turn before night, said the captain to the boys.")
    rng, lock = random.Random(5), threading.Lock()

    def one(_: int) -> Generation:
        with lock:
            plan = BEGINNINGS.plan(rng, pool, 1024)
        generation = Generation("prefix", time.time(), len(plan.prompt))
        client.run(generation, plan.prompt, 8, None)
        return generation

    with ThreadPoolExecutor(6) as threads:
        seen = list(threads.map(one, range(360)))[120:]  # the first fill the caches
    failed = [each.outcome for each in seen if each.outcome != OK]
    if failed:
        raise Failed(f"{len(failed)} requests failed, the first by {failed[0]}")
    return sum(each.cached_tokens for each in seen) / (256 * len(seen))


def prove_scaling() -> None:
    """From one replica to two. Raises Failed."""
    serve.delete("ropeway")
    start(min_replicas=1, max_replicas=2, target_requests=4, upscale_seconds=1)
    expect("it begins with one replica", len(replicas()) == 1)
    began = time.monotonic()
    while len(replicas()) < 2 and time.monotonic() - began < 90:
        with Load():
            pass
    took = time.monotonic() - began
    expect("load starts a second replica", len(replicas()) == 2, f"after {took:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: proved; 1: not."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        prove_failures()
        shares = {routing: cached_share(routing) for routing in ("load", "prefix")}
        found = ", ".join(f"{share:.0%} by {routing}" for routing, share in shares.items())
        expect("routing by prefix finds more pages", shares["prefix"] > shares["load"], found)
        prove_scaling()
    except Failed as failure:
        print(f"not proved: {failure}", file=sys.stderr)
        return 1
    finally:
        serve.shutdown()
        ray.shutdown()
    print("proved: replicas share the load, and no stream is lost with one of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
