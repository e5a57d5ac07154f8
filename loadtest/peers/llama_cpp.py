"""llama.cpp: its llama-batched-bench offline, its llama-server over HTTP, on a GGUF file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.client import LlamaCpp
from loadtest.errors import Unmeasurable
from loadtest.peers.base import Rates, Reached
from loadtest.servers import free_port, started
from loadtest.workload import Workload

COMMON = ("--flash-attn", "on", "--batch-size", "2048", "--ubatch-size", "512")


class LlamaBatchedBench:
    """Decodes random tokens in a batch; it does not choose them, which is left out of its time."""

    def __init__(self, binary: Path, gguf: Path, kind: str, threads: int) -> None:
        self.name = f"llama.cpp {kind}"
        self._command = [str(binary), "-m", str(gguf), *COMMON]
        self._command += ["--threads", str(threads), "--threads-batch", str(threads)]

    def run(self, workload: Workload, repeat: int) -> Rates:
        """See Offline; repeat plays no part, its tokens are its own."""
        measured = self._measure(workload.prompt_tokens, workload.output_tokens, workload.streams)
        tokens = workload.streams * workload.output_tokens
        return Rates(tokens / measured["t"], measured["speed_tg"])

    def prefill(self, tokens: int, repeat: int) -> float:
        """See Offline."""
        speed: float = self._measure(tokens, 1, 1)["speed_pp"]
        return speed

    def _measure(self, prompt: int, output: int, streams: int) -> dict[str, Any]:
        """What it says of the second of two equal runs; the first warms up."""
        sizes = {"-npp": prompt, "-ntg": output, "-npl": f"{streams},{streams}"}
        sizes["-c"] = streams * (prompt + output)
        options = [str(each) for pair in sizes.items() for each in pair]
        command = [*self._command, *options, "--output-format", "jsonl"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
        if ended.returncode or len(lines) != 2:
            raise Unmeasurable(
                f"{command[0]} ended with status {ended.returncode} and {len(lines)} results: "
                f"{ended.stderr[-500:]}"
            )
        measured: dict[str, Any] = json.loads(lines[-1])
        return measured


class LlamaServer:
    """llama-server with a slot for each stream; its prompt cache is off, as ours finds nothing."""

    def __init__(
        self, binary: Path, gguf: Path, kind: str, threads: int, streams: int, context: int
    ) -> None:
        """context: tokens of one stream."""
        self.name = f"llama.cpp {kind}"
        self._gguf = gguf
        self._command = [str(binary), "-m", str(gguf), *COMMON]
        self._command += ["--threads", str(threads), "--threads-batch", str(threads)]
        self._command += ["--parallel", str(streams), "--ctx-size", str(streams * context)]

    @contextmanager
    def serve(self) -> Iterator[Reached]:
        """See Serving; what it logs goes beside the GGUF file."""
        port = free_port()
        command = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
        log = self._gguf.with_suffix(".log")
        with started(command, port, "/health", log) as server:
            yield Reached(server, LlamaCpp())
