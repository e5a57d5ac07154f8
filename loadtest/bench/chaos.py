"""Streams over real sockets while clients leave, read slowly and the engine is killed, in a cache
too small by half. What survives must be what a run alone gives, and nothing may be left."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import Progress

from engine import LLM, Completion, RequestOptions, SamplingParams
from engine.config import DType
from engine.messages import EngineReady
from loadtest.bench.crowd import MANNERS, Crowd, Seen
from loadtest.bench.options import DEFAULT_MODEL, Dtype, Json, Model
from loadtest.bench.victim import Footprint, Victim, victim
from loadtest.report import write
from loadtest.servers import free_port

RECOVERY_SECONDS = 60.0
QUIET_SECONDS = 30.0
"""How long the server gets to have freed everything after the last stream."""

GROWTH, GROWTH_MIB = 1.05, 4.0
"""Memory is flat where the last third of the rounds takes at most so much more than the third
before it, and the allowance for noise."""

LEFT = ("num_requests_running", "num_requests_waiting", "kv_blocks_used", "open_streams")
JUDGED_ROUNDS = 6


@dataclass(frozen=True)
class Plan:
    """How much of it. kills: of the engine process, in each round."""

    streams: int
    rounds: int
    kills: int
    seed: int
    prompt_tokens: int
    output_tokens: int
    max_num_seqs: int

    def bodies(self, token_ids: Sequence[int], context: int) -> list[dict[str, Any]]:
        """Bodies of /generate, the same in every round: half begin alike; greedy and sampled, with
        penalties, log-probabilities and priorities; every tenth outgrows the context and shifts."""
        rng = random.Random(f"chaos.{self.seed}")
        common = [rng.choice(token_ids) for _ in range(self.prompt_tokens)]
        bodies: list[dict[str, Any]] = []
        for at in range(self.streams):
            length = rng.randint(1, self.prompt_tokens)
            shared = rng.randint(0, length) if at % 2 else 0
            own = [rng.choice(token_ids) for _ in range(length - shared)]
            body: dict[str, Any] = {
                "prompt": common[:shared] + own,
                "max_tokens": rng.randint(1, self.output_tokens),
                "temperature": (0.0, 0.8, 1.2)[at % 3],
                "top_p": (1.0, 0.9)[at % 2],
                "frequency_penalty": (0.0, 0.0, 0.3)[at % 3],
                "seed": self.seed + at,
                "ignore_eos": True,
                "logprobs": 20,
                "priority": rng.choice((0, 0, 0, 1, -1)),
            }
            if at % 10 == 9:
                body["prompt"] = (body["prompt"] * context)[: context - rng.randrange(8)]
                body["overflow"] = "shift"
            bodies.append(body)
        return bodies


@dataclass(frozen=True)
class Round:
    """What came of one. preemptions: since the engine last died; left: gauges that were not zero in
    the end; tasks: beyond those before."""

    seconds: float
    done: int
    disconnected: int
    tokens: int
    kills: int
    retries: int
    preemptions: int
    faults: list[str]
    left: dict[str, float]
    tasks: int
    footprint: Footprint


async def kill_now_and_then(
    server: Victim, crowd: Crowd, plan: Plan, total: int, rng: random.Random
) -> None:
    """Kill the engine at random moments of a round, until there are no tokens left to wait for.

    Never while requests run alone to find a guilty one: a second death there means their guilt.
    """
    moments = sorted(rng.uniform(0.05, 0.6) * total for _ in range(plan.kills))
    least = 0
    async with aiohttp.ClientSession() as session:
        for moment in moments:
            while crowd.tokens < max(moment, least):
                if crowd.over:
                    return
                await asyncio.sleep(0.005)
            server.kill_engine()
            await server.until(session, 503, RECOVERY_SECONDS)
            await server.until(session, 200, RECOVERY_SECONDS)
            least = crowd.tokens + 2 * plan.max_num_seqs


async def quiet(
    server: Victim, session: aiohttp.ClientSession, tasks: float
) -> tuple[dict[str, float], int]:
    """What is still there once everything had time to go: gauges above zero, and tasks."""
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        metrics = await server.metrics(session)
        left = {name: metrics[name] for name in LEFT if metrics[name]}
        more = int(metrics["event_loop_tasks"] - tasks)
        if (not left and more <= 0) or time.monotonic() > deadline:
            return left, more
        await asyncio.sleep(0.1)


async def play(
    server: Victim,
    plan: Plan,
    number: int,
    bodies: Sequence[dict[str, Any]],
    alone: Sequence[Completion],
    tasks: float,
) -> Round:
    """One round. tasks: of the HTTP process's event loop when nothing runs."""
    rng = random.Random(f"chaos.{plan.seed}.{number}")
    crowd = Crowd(server.url, rng, plan.output_tokens)
    total = sum(len(each.token_ids) for each in alone)
    began = time.perf_counter()
    async with aiohttp.ClientSession() as session:
        before = await server.metrics(session)
        manners = [rng.choice(MANNERS) for _ in bodies]
        killing = asyncio.create_task(kill_now_and_then(server, crowd, plan, total, rng))
        seen = await asyncio.gather(*map(crowd.stream, bodies, manners))
        seconds = time.perf_counter() - began
        crowd.over = True
        await killing
        left, more = await quiet(server, session, tasks)
        after = await server.metrics(session)
    faults = [
        f"stream {at} ({manners[at]}): {fault}"
        for at, pair in enumerate(zip(seen, alone, strict=True))
        if (fault := Seen.difference(*pair)) is not None
    ]
    ends = Counter(each.end for each in seen)
    return Round(
        seconds=round(seconds, 2),
        done=ends["done"],
        disconnected=ends["left"],
        tokens=crowd.tokens,
        kills=int(after["engine_deaths_total"] - before["engine_deaths_total"]),
        retries=crowd.retries,
        preemptions=int(after["preemptions_total"]),
        faults=faults,
        left=left,
        tasks=more,
        footprint=server.footprint(),
    )


def run_alone(
    llm: LLM, bodies: Sequence[dict[str, Any]], progress: Callable[[], None] = lambda: None
) -> list[Completion]:
    """Each request alone, in an engine of its own cache: what every round is held against."""
    names = SamplingParams.__struct_fields__
    completions = []
    for at, body in enumerate(bodies):
        params = SamplingParams(**{name: body[name] for name in names if name in body})
        options = RequestOptions(overflow=body.get("overflow", "error"), cache_salt=str(at))
        completions += llm.generate([body["prompt"]], params, options)
        progress()
    return completions


def half_memory(info: EngineReady, plan: Plan, bodies: Sequence[dict[str, Any]]) -> int:
    """Bytes for half of the pages that the requests of a full step would come to hold, but at least
    for the longest of them."""
    window = info.max_position // info.block_size
    pages = [
        min(-(-(len(body["prompt"]) + body["max_tokens"] - 1) // info.block_size), window)
        for body in bodies
    ]
    together = statistics.fmean(pages) * min(plan.max_num_seqs, plan.streams)
    num_blocks: int = max(*pages, round(together / 2))
    return num_blocks * (info.kv_bytes // info.num_blocks)


def is_flat(values: Sequence[float]) -> bool:
    """Whether the last third of the rounds takes no more than the third before it."""
    third = len(values) // 3
    before, after = values[-2 * third : -third], values[-third:]
    return statistics.median(after) <= statistics.median(before) * GROWTH + GROWTH_MIB


def verdict(rounds: Sequence[Round], exit_status: int) -> list[str]:
    """What failed; empty where nothing did. Memory is judged from six rounds on."""
    reasons = [
        f"round {number}: {what}"
        for number, each in enumerate(rounds, start=1)
        for what in (
            *each.faults,
            *(f"{name} is {value:g} in the end" for name, value in each.left.items()),
            *([f"{each.tasks} tasks are left"] if each.tasks > 0 else []),
        )
    ]
    if len(rounds) >= JUDGED_ROUNDS:
        for name in Footprint.__dataclass_fields__:
            values = [getattr(each.footprint, name) for each in rounds]
            if not is_flat(values):
                reasons.append(f"{name} grows: {', '.join(map(str, values))}")
    if exit_status != 0:
        reasons.append(f"the server stopped with status {exit_status}")
    return reasons


async def run(
    model: Path,
    dtype: DType,
    threads: int,
    port: int,
    plan: Plan,
    progress: Callable[[], None],
    tell: Callable[[Round], None],
) -> dict[str, Any]:
    """Runs alone, then the rounds, then SIGTERM. tell: called with each round as it ends."""
    llm = LLM(
        model,
        dtype=dtype,
        threads=threads,
        max_num_seqs=1,
        max_num_batched_tokens=4096,
    )
    info = llm.info
    known = [token_id for token_id in range(len(llm.tokenizer)) if token_id in llm.tokenizer]
    bodies = plan.bodies(known, info.max_position)
    alone = run_alone(llm, bodies, progress)
    memory = half_memory(info, plan, bodies)
    options = {
        "dtype": info.dtype,
        "threads": threads,
        "kv-memory": memory,
        "max-num-seqs": plan.max_num_seqs,
        "max-queue": plan.streams // 2,
        "max-restarts": 1 + plan.kills * plan.rounds,
    }
    arguments = [each for name, value in options.items() for each in (f"--{name}", str(value))]
    rounds = []
    async with victim(model, port, arguments) as server:
        async with aiohttp.ClientSession() as session:
            tasks = (await server.metrics(session))["event_loop_tasks"]
        for number in range(plan.rounds):
            rounds.append(await play(server, plan, number, bodies, alone, tasks))
            tell(rounds[-1])
            progress()
        exit_status = await server.stop(RECOVERY_SECONDS)
    reasons = verdict(rounds, exit_status)
    return {
        "command": "chaos",
        "model": {"name": info.model, "parameters": info.num_parameters},
        "engine": {"dtype": info.dtype, "device": info.device, "attention": info.attention},
        **asdict(plan),
        "pages": memory // (info.kv_bytes // info.num_blocks),
        "rounds": [asdict(each) for each in rounds],
        "compared": sum(each.done + each.disconnected for each in rounds),
        "engine_kills": sum(each.kills for each in rounds),
        "exit_status": exit_status,
        "failed": reasons,
        "verdict": "FAIL" if reasons else "PASS",
    }


def chaos(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    threads: Annotated[int, typer.Option(help="Engine threads.", min=1)] = 1,
    streams: Annotated[int, typer.Option(help="Clients in each round.", min=1)] = 200,
    rounds: Annotated[int, typer.Option(help="How often; the same requests.", min=1)] = 10,
    kills: Annotated[int, typer.Option(help="kill -9 of the engine in each round.", min=0)] = 2,
    seed: Annotated[int, typer.Option(help="Of requests and of what happens to them.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.", min=1)] = 160,
    output_tokens: Annotated[int, typer.Option(help="Longest output.", min=2)] = 160,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 32,
    json_file: Json = None,
) -> None:
    """Mistreat a server of its own: clients that leave or read slowly, kill -9 of the engine, a
    cache too small by half. Every output that survives is compared with a run alone.

    Prints JSON and a verdict; exits with 1 if it is FAIL.
    """
    plan = Plan(streams, rounds, kills, seed, prompt_tokens, output_tokens, max_num_seqs)
    console = Console(stderr=True)

    def tell(each: Round) -> None:
        console.print(
            f"{each.seconds:g} s: {each.done} done, {each.disconnected} left, {each.kills} kills, "
            f"{len(each.faults)} faults, {sum(each.left.values()):g} things left, "
            f"{each.footprint.http_mib} + {each.footprint.engine_mib} MiB"
        )

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("alone, then together", total=streams + rounds)
        document = asyncio.run(
            run(model, dtype, threads, free_port(), plan, lambda: bar.advance(task), tell)
        )
    write(document, json_file)
    for reason in document["failed"]:
        console.print(reason, style="red", markup=False)
    console.print(
        f"{document['verdict']}: {rounds} rounds, {document['compared']} outputs compared, "
        f"{document['engine_kills']} deaths of the engine, {len(document['failed'])} faults"
    )
    if document["failed"]:
        raise typer.Exit(1)
