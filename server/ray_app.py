"""Replicas of the engine on Ray Serve: `serve run server.ray_app:build model=weights/default`.

    HTTP -> Gateway -> PrefixRouter -> one of N EngineReplicas

An EngineReplica is a whole server without its socket: the same application, called in process. The
Gateway passes requests to replicas and what they answer back, and asks another replica where one
dies (`server/replicas/splice.py` says why that is safe). Ray places replicas, starts dead ones
again, scales their number by requests under way, and updates them one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from engine.config import CacheConfig, Device, DType, EngineConfig, SchedulerConfig
from engine.errors import EngineDead
from engine.frontend.client import AsyncEngine
from engine.frontend.process import EngineProcess, Supervisor
from engine.frontend.tokenizer import Tokenizer
from server.app import create_app
from server.chat import ChatTemplate
from server.replicas.affinity import PrefixAffinity
from server.replicas.call import Call, Head
from server.replicas.gateway import Gateway
from server.settings import ServerSettings

POLL_SECONDS = 0.05
GATEWAY_REQUESTS = 10_000
HEADER = b"x-ropeway-replica"
"""Which replica began the answer."""


class ScaleSettings(BaseModel):
    """Arguments of `serve run server.ray_app:build NAME=VALUE ...`.

    target_requests: requests under way for each replica that Ray aims at, once their number has
    been off that for upscale_seconds or downscale_seconds; slack: how many more than the least
    loaded replica the one with the right pages may have; attempts: replicas asked at most for one
    request; drain_seconds: what a replica that is replaced gives its streams.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target_requests: float = Field(24.0, gt=0)
    upscale_seconds: float = Field(10.0, ge=0)
    downscale_seconds: float = Field(300.0, ge=0)
    routing: Literal["prefix", "load"] = "prefix"
    slack: int = Field(8, ge=1)
    attempts: int = Field(3, ge=1)
    drain_seconds: float = Field(60.0, ge=0)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    threads: int | None = Field(1, ge=1)
    device: Device = "auto"
    dtype: DType = "auto"
    kv_memory: int | None = Field(None, ge=1)
    max_num_seqs: int = Field(SchedulerConfig().max_num_seqs, ge=1)
    max_queue: int = Field(256, ge=0)


class PrefixRouter(RequestRouter):
    """Ray's interface to PrefixAffinity; one in each process that sends requests to replicas."""

    def initialize_state(self, slack: int) -> None:
        """slack: as PrefixAffinity has it."""
        self._affinity = PrefixAffinity(slack)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each: Ray takes the first that has room."""
        replicas = {str(each.replica_id.unique_id): each for each in candidate_replicas}
        loads = {
            name: self.replica_queue_len_cache.get(each.replica_id) or 0
            for name, each in replicas.items()
        }
        return [[replicas[name]] for name in self._affinity.rank(_keys(pending_request), loads)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Remember."""
        self._affinity.routed(_keys(pending_request), str(replica_id.unique_id))


def _keys(pending_request: PendingRequest | None) -> tuple[bytes, ...]:
    call = pending_request.args[0] if pending_request and pending_request.args else None
    return call.keys if isinstance(call, Call) else ()


class EngineReplica:
    """One engine process and the application around it."""

    async def __init__(self, settings: ScaleSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Ready when it returns. Raises EngineStartError, TokenizerError or ConfigError."""
        self._name = str(serve.get_replica_context().replica_id.unique_id).encode()
        directory = Path(settings.model)
        tokenizer = Tokenizer.from_directory(directory)
        chat = ChatTemplate.from_directory(directory, tokenizer)
        server = ServerSettings(max_queue=settings.max_queue, drain_seconds=settings.drain_seconds)
        self._process = EngineProcess(
            EngineConfig(
                model_dir=str(directory),
                device=settings.device,
                dtype=settings.dtype,
                threads=settings.threads,
                cache=CacheConfig(kv_memory=settings.kv_memory),
                scheduler=SchedulerConfig(max_num_seqs=settings.max_num_seqs),
                num_token_ids=len(tokenizer),
                unused_token_ids=tuple(tokenizer.unused_ids),
            )
        )
        self._process.start()
        self._engine = AsyncEngine(
            tokenizer, self._process.address, max_queue=server.max_queue, recovers=True
        )
        self._app = create_app(self._engine, chat, server, self._process.exit_status)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        while self._engine.unready is not None:
            if self._engine.error is not None:
                raise self._engine.error
            await asyncio.sleep(POLL_SECONDS)
        supervisor = Supervisor(self._process, server.max_restarts)
        self._watching = asyncio.create_task(self._watch(supervisor))

    async def respond(self, call: Call) -> AsyncIterator[Head | bytes]:
        """The application's answer: its Head, then the pieces of its body.

        Closing the iterator is the client's leaving.
        """
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue(1)
        given = asyncio.Event()
        gone = asyncio.Event()

        async def receive() -> MutableMapping[str, Any]:
            if not given.is_set():
                given.set()
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(call.scope, receive, messages.put)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield Head(message["status"], (*message["headers"], (HEADER, self._name)))
                elif message["body"]:
                    yield message["body"]
        finally:
            gone.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def check_health(self) -> None:
        """Ray starts another replica where this raises."""
        if self._engine.error is not None:
            raise self._engine.error

    async def __del__(self) -> None:
        """Ray calls it when the replica's streams have ended, or had their time."""
        self._watching.cancel()
        await self._lifespan.__aexit__(None, None, None)
        self._process.stop(5.0)

    async def _watch(self, supervisor: Supervisor) -> None:
        while self._engine.alive:
            if (status := supervisor.poll()) is not None:
                self._engine.fail(EngineDead(f"the engine process ended with status {status}"))
            await asyncio.sleep(POLL_SECONDS)


class RayGateway(Gateway):
    """The gateway of replicas that Ray runs."""

    def __init__(self, replicas: DeploymentHandle, attempts: int) -> None:
        """replicas: of EngineReplica."""
        super().__init__(replicas.options(stream=True), attempts, (RayError, RayServeException))


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application, of ScaleSettings. Run again, it replaces the replicas one after another."""
    settings = ScaleSettings.model_validate(arguments)
    if settings.max_replicas < settings.min_replicas:
        raise ValueError(
            f"max_replicas must be at least min_replicas ({settings.min_replicas}), "
            f"got {settings.max_replicas}"
        )
    options: dict[str, Any] = {}
    if settings.routing == "prefix":
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": settings.slack}
        )
    replicas = serve.deployment(
        EngineReplica,
        max_ongoing_requests=settings.max_num_seqs + settings.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_requests,
            upscale_delay_s=settings.upscale_seconds,
            downscale_delay_s=settings.downscale_seconds,
        ),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        **options,
    )
    gateway = serve.deployment(
        RayGateway,
        max_ongoing_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(replicas.bind(settings), settings.attempts)
