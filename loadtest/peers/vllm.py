"""vLLM for CPU, over HTTP, on the GPT-NeoX directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.client import OpenAI
from loadtest.peers.base import Reached
from loadtest.servers import free_port, started

CACHE_GIB = 4
MODULE = "vllm.entrypoints.openai.api_server"
WITHIN = 'unset PYTHONPATH; PATH="$0:$PATH" exec "$@"'
"""Its virtual environment first, where its tools are, and no path of ours."""


class VllmServing:
    """`vllm serve`, without a tokenizer: token ids go in, and are counted as they come."""

    def __init__(
        self, binary: Path, neox: Path, dtype: str, threads: int, streams: int, context: int
    ) -> None:
        self.name = "vllm"
        self._binary = binary
        self._neox = neox
        self._options = ["--dtype", dtype, "--max-num-seqs", str(streams)]
        self._options += ["--max-model-len", str(context), "--skip-tokenizer-init"]
        self._environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    @contextmanager
    def serve(self) -> Iterator[Reached]:
        """See Serving; what it logs goes beside the model directory."""
        port = free_port()
        # its `vllm` command fails where the distribution is called vllm-cpu
        command = [str(self._binary.with_name("python")), "-m", MODULE]
        command += ["--model", str(self._neox), *self._options]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
        settings = [f"{name}={value}" for name, value in self._environment.items()]
        within = ["sh", "-c", WITHIN, str(self._binary.parent), "env", *settings]
        log = self._neox.with_name("vllm.log")
        with started([*within, *command], port, "/health", log) as server:
            yield Reached(server, OpenAI("model"))
