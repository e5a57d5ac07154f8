"""Ropeway itself, as one among the peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import LLM
from engine.config import DType, Quantize
from loadtest.client import ROPEWAY
from loadtest.peers.base import Rates, Reached
from loadtest.servers import ropeway
from loadtest.workload import Workload, run_offline


class OursOffline:
    """The engine in this process; determinism is on, as always."""

    def __init__(
        self, model: Path, dtype: DType, quantize: Quantize, threads: int, vocab_size: int
    ) -> None:
        self.name = "ropeway"
        self._llm = LLM(model, dtype=dtype, quantize=quantize, threads=threads)
        self._vocab_size = vocab_size

    def run(self, workload: Workload, repeat: int) -> Rates:
        """See Offline."""
        measured = run_offline(self._llm, workload, repeat)
        return Rates(measured.tokens_per_s, measured.decode_tokens_per_s)

    def prefill(self, tokens: int, repeat: int) -> float:
        """See Offline."""
        workload = Workload(1, tokens, 2, self._vocab_size, seed=tokens)
        return tokens / run_offline(self._llm, workload, repeat).first_token_s[0]


class OursServing:
    """`ropeway serve`."""

    def __init__(self, model: Path, dtype: DType, quantize: Quantize, threads: int) -> None:
        self.name = "ropeway"
        self._model = model
        self._options = ["--dtype", dtype, "--quantize", quantize, "--threads", str(threads)]

    @contextmanager
    def serve(self) -> Iterator[Reached]:
        """See Serving."""
        with ropeway(self._model, *self._options) as server:
            yield Reached(server, ROPEWAY)
