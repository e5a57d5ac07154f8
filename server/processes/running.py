"""The processes of `ropeway serve`: started, watched, and stopped in order."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from engine.frontend.process import EngineProcess, Supervisor
from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineReady
from server.chat import ChatTemplate
from server.processes.peer import PeerConfig, PeerProcess
from server.settings import ServerSettings
from server.terminal.outcome import FAILED, INTERRUPTED, MISUSED, fail

STOP_SECONDS = 5.0
CRASH_SECONDS = 2.0


def run(
    process: EngineProcess,
    directory: Path,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    listeners: Sequence[socket.socket],
    settings: ServerSettings,
    announce: Callable[[EngineReady], None],
) -> None:
    """Serve until told to stop; ends the program by an exit code where that is not 0.

    process: not started yet; directory: the model's; listeners: one for each HTTP process, of which
    the first is this one; announce: called when the model is loaded.
    """
    peers: list[PeerProcess] = []
    patience = 0.0  # with what is still running, where we are interrupted
    try:
        process.start()
        # Takes long, as what the engine process imports does: so both do it at once.
        from server.processes.worker import HttpWorker  # noqa: PLC0415  # see above

        for number, other in enumerate(listeners[1:], start=1):
            peer = PeerConfig(
                address=process.address,
                model_dir=str(directory),
                listener=other.fileno(),
                settings=replace(settings, worker=number),
            )
            peers.append(PeerProcess(peer))
            other.close()
        worker = HttpWorker(
            tokenizer,
            chat,
            process.address,
            listeners[0],
            settings,
            exited=process.exit_status,
            supervise=Supervisor(process, settings.max_restarts).poll,
            peers=peers,
        )
        lived = worker.run(announce)
        # A process that crashed closes its connections a moment before it has a status.
        status = process.exit_status() if lived else process.wait(CRASH_SECONDS)
        # Without an engine the peers end too: that is no crash of theirs.
        crashed = status is None and any(each.exit_status() not in (None, 0) for each in peers)
        patience = 0.0 if worker.hurried else STOP_SECONDS
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for each in peers:
            each.stop(patience)
        process.stop(patience)
    if worker.hurried:
        raise typer.Exit(INTERRUPTED)
    if not lived:
        if status in (FAILED, MISUSED):  # the engine process has said what is wrong
            raise typer.Exit(status)
        if crashed:
            fail("an HTTP worker process ended", FAILED)
        if status is None:  # it lives; what broke is in the log
            fail("the connection to the engine broke", FAILED)
        fail(f"the engine process ended with status {status}", FAILED)
