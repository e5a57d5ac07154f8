"""Requests made from the OpenAPI document: no fault of the server, no undocumented answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from engine.messages import AbortRequest, AddRequest, EngineReady, Hello
from engine.request import FinishReason
from tests.server.conftest import SETTINGS, running
from tests.server.fake_engine import READY

EXAMPLES = 25
ROOM: EngineReady = READY


async def answer_all(directory: Path, ready: asyncio.Future[int], stop: asyncio.Event) -> None:
    """A server whose engine answers everything by one token."""
    async with running(directory, replace(SETTINGS, max_queue=1000)) as served:
        await served.until_ready()
        ready.set_result(served.port)
        while not stop.is_set():
            try:
                message = await served.fake.next(timeout=0.1)
            except TimeoutError:
                continue
            match message:
                case AddRequest():
                    await served.fake.say(message, b"x", end=FinishReason.LENGTH)
                case AbortRequest() | Hello():
                    pass
