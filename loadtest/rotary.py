"""`python -m loadtest.rotary`: RotaryEmbedding's speed beside rotary-embedding-torch's, as JSON.

The two take turns in one process, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from engine.model.rotary import RotaryEmbedding

try:
    from rotary_embedding_torch import RotaryEmbedding as LibraryEmbedding
except ImportError:  # what tests and this benchmark need, and nothing that serves
    LibraryEmbedding = None


@dataclass(frozen=True)
class Case:
    """One kind of call. dim of head_dim features are rotated; offset: tokens before these."""

    name: str
    shape: tuple[int, int, int, int]  # batch, heads, time, head_dim
    dim: int = 64
    offset: int = 0
    backward: bool = False
    learned: bool = False
    xpos: bool = False
    dtype: str = "float32"

    def work(self, module: Any) -> Callable[[], object]:
        """A query and a key rotated by the module, and differentiated where asked."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        q, k, weight = torch.randn(3, *self.shape, generator=generator).to(dtype)
        q.requires_grad_(self.backward)
        k.requires_grad_(self.backward)
        wanted = [q, k, *([module.freqs] if self.learned else [])]

        def rotate() -> tuple[Tensor, Tensor]:
            if self.xpos:
                query, key = module.rotate_queries_and_keys(q, k)
            else:
                query = module.rotate_queries_or_keys(q, offset=self.offset)
                key = module.rotate_queries_or_keys(k, offset=self.offset)
            return query, key

        def differentiate() -> object:
            return torch.autograd.grad(rotate(), wanted, [weight, weight])

        return differentiate if self.backward else rotate


PREFILL, DECODE, TRAIN = (1, 12, 512, 64), (16, 12, 1, 64), (4, 12, 256, 64)
CASES = (
    Case("decode", DECODE, offset=700),
    Case("prefill", PREFILL),
    Case("prefill, 32 of 64", PREFILL, dim=32),
    Case("prefill, bfloat16", PREFILL, dtype="bfloat16"),
    Case("prefill, xPos", PREFILL, xpos=True),
    Case("training", TRAIN, backward=True),
    Case("training, 32 of 64", TRAIN, dim=32, backward=True),
    Case("training, learned", TRAIN, backward=True, learned=True),
)


def measure(case: Case, repeats: int, seconds: float) -> dict[str, Any]:
    """Microseconds a call of both, and the library's over ours; each sample takes `seconds`."""
    options: dict[str, Any] = {"learned_freq": case.learned, "use_xpos": case.xpos}
    works = {
        "ours": case.work(RotaryEmbedding(case.dim, **options)),
        "library": case.work(LibraryEmbedding(case.dim, **options)),
    }
    calls: dict[str, int] = {}
    for name, work in works.items():
        work()
        start = time.perf_counter()
        work()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                work()
            times[name].append((time.perf_counter() - start) / calls[name])
    ratios = [b / a for a, b in zip(times["ours"], times["library"], strict=True)]
    return {
        **asdict(case),
        "ours_us": _spread([1e6 * each for each in times["ours"]], 1),
        "library_us": _spread([1e6 * each for each in times["library"]], 1),
        "ratio": _spread(ratios, 2),
    }


def _spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def main(
    repeats: Annotated[int, typer.Option(help="Samples of each; the median counts.", min=1)] = 7,
    seconds: Annotated[float, typer.Option(help="Length of a sample.", min=0)] = 0.02,
) -> None:
    """Time RotaryEmbedding and rotary-embedding-torch; ratio: the library's time over ours."""
    if LibraryEmbedding is None:
        print("needs: pip install rotary-embedding-torch", file=sys.stderr)
        raise typer.Exit(2)
    results = [measure(case, repeats, seconds) for case in CASES]
    document = {
        "command": "rotary",
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "results": results,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    typer.run(main)
