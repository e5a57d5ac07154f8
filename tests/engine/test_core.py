"""The engine process's loop, over its real socket."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import zmq

from engine.config import EngineConfig
from engine.core import EngineCore, EngineLoop
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    FromCore,
    Hello,
    StepOutput,
    ToCore,
)
from engine.params import SamplingParams
from tests.patience import PATIENCE


class SteppedCore(EngineCore):
    """Makes a step only when the test permits it."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def step(self) -> list[EngineOutput]:
        self.entered.release()
        self.permits.acquire()
        return super().step()


def test_an_abort_frees_pages_within_one_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    core = SteppedCore(EngineConfig(model_dir=str(tiny_model_dir), device="cpu", dtype="float32"))
    address = f"ipc://{tmp_path / 'engine'}"
    decoder = msgspec.msgpack.Decoder(FromCore)
    parent, end = os.pipe()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        loop = threading.Thread(target=EngineLoop(core, router).run, args=(parent,), daemon=True)
        loop.start()
        with context.socket(zmq.DEALER) as client:
            client.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))

            def send(message: ToCore) -> None:
                client.send(msgspec.msgpack.encode(message))

            def receive() -> StepOutput:
                message = decoder.decode(client.recv())
                assert isinstance(message, StepOutput)
                return message

            client.connect(address)
            send(Hello())
            decoder.decode(client.recv())
            send(
                AddRequest(
                    request_id="r",
                    prompt_token_ids=[1] * 70,
                    params=SamplingParams(ignore_eos=True),
                    seed=0,
                    max_tokens=100,
                    stop_token_ids=[],
                )
            )
            core.entered.acquire()
            core.permits.release()
            while not (first := receive()).outputs:  # what it said before there was work
                pass
            assert first.stats.blocks_free < first.stats.blocks_total
            core.entered.acquire()  # the next step has begun when the client goes
            send(AbortRequest("r"))
            assert router.poll(int(1000 * PATIENCE))  # the loop does not touch it meanwhile
            core.permits.release()
            assert receive().stats.steps == first.stats.steps + 1
            after = receive()  # and it was the last one
            assert after.stats.steps == first.stats.steps + 1
            assert after.stats.running == 0
            assert after.stats.blocks_free == after.stats.blocks_total
            os.close(end)
            loop.join(PATIENCE)
            assert not loop.is_alive()
    os.close(parent)
