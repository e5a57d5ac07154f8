"""Medians, spreads, percentiles, limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loadtest import others
from loadtest.figures import percentile, ranged, share, spread
from loadtest.machine import Machine
from loadtest.others import Others, doubt
from loadtest.roofline import Sizes, decode_limit, prefill_limit
from loadtest.workload import Measured, Workload


def test_spread_and_percentile() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.95) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert ranged(spread([1.0, 3.0])) == "2.0 (1.0-3.0)"
    assert ranged(None) == share(None) == ""
    assert share(0.456) == "46 %"


def test_measured() -> None:
    measured = Measured(
        started=10.0, seconds=4.0, arrivals={0: [11.0, 12.0, 14.0], 1: [12.0, 13.0]}
    )
    assert measured.tokens_per_s == 5 / 4
    assert measured.first_token_s == [1.0, 2.0]
    assert measured.gaps_s == [1.0, 2.0, 1.0]
    assert measured.decode_tokens_per_s == 1.0  # two tokens in the two seconds after 12


def test_prompts_differ_and_repeat() -> None:
    workload = Workload(streams=2, prompt_tokens=9, output_tokens=4, vocab_size=1000)
    assert workload.prompts(0) == workload.prompts(0)
    assert workload.prompts(0) != workload.prompts(1)
    assert all(0 <= token < 1000 for prompt in workload.prompts(0) for token in prompt)


@pytest.mark.parametrize("field", ["streams", "prompt_tokens", "output_tokens"])
def test_workload_refuses(field: str) -> None:
    sizes = {"streams": 1, "prompt_tokens": 1, "output_tokens": 2, "vocab_size": 9} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        Workload(**sizes)


MACHINE = Machine(
    "x", 2, "2", read_gb_s=10.0, gemm_float32_gflop_s=100.0, gemm_bfloat16_gflop_s=200.0
)


def test_limits_by_hand() -> None:
    sizes = Sizes(
        parameters=1_000_000,
        embedding=400_000,
        layers=2,
        hidden=64,
        device="cpu",
        dtype="bfloat16",
        file_bytes=3_000_000,
        weight_bytes=2_000_000,
        kv_bytes=512,
        vocab_size=9,
        max_position=64,
    )
    # 2 MB of weights and 4 streams x 15 tokens x 512 bytes, at 10 GB/s
    step = (2_000_000 + 4 * 15 * 512) / 10e9
    assert decode_limit(sizes, MACHINE, Workload(4, 10, 10, 9)) == pytest.approx(4 / step)
    # 3 tokens see 1 + 2 + 3 others; scores and values take two operations a feature each
    work = 3 * 2 * 600_000 + 2 * 400_000 + 6 * 4 * 64 * 2
    assert prefill_limit(sizes, MACHINE, 3) == pytest.approx(3 * 200e9 / work)


def test_sizes_of_a_model(tiny_model_dir: Path) -> None:
    sizes = Sizes.of(tiny_model_dir, "float32")
    stored = load_file(tiny_model_dir / "model.safetensors")
    assert sizes.parameters == sum(tensor.numel() for tensor in stored.values())
    assert sizes.weight_bytes == sizes.file_bytes == 4 * sizes.parameters
    assert sizes.embedding == stored["embedding.weight"].numel()
    assert sizes.kv_bytes == 2 * 2 * 64 * 4
    assert (sizes.max_position, sizes.dtype) == (192, "float32")


@pytest.mark.parametrize("tied", [True, False])
def test_products_in_bfloat16_are_held_in_12_bits(
    tiny_model_dir: Path, tmp_path: Path, tied: bool
) -> None:
    described = json.loads((tiny_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"tie_embeddings": tied}))
    sizes = Sizes.of(tmp_path, "bfloat16")
    stored = load_file(tiny_model_dir / "model.safetensors")
    matrices = sum(
        tensor.numel()
        for name, tensor in stored.items()
        if tensor.ndim == 2 and name not in ("embedding.weight", "head.weight")
    )
    matrices += sizes.embedding  # the head; an embedding of its own is looked up
    assert sizes.file_bytes == 2 * sizes.parameters
    assert sizes.file_bytes - sizes.weight_bytes == matrices / 2


BURN = "import time; t = time.process_time\nwhile t() < 0.3: pass\nprint(flush=True); input()"


def test_own_time_includes_children() -> None:
    """While they live, and after they ended."""
    before = others._own_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert others._own_seconds() - before >= 0.28
        child.communicate(b"\n")
    assert others._own_seconds() - before >= 0.28


def test_others_are_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"busy": 100.0, "own": 7.0, "now": 50.0}
    monkeypatch.setattr(others, "_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(others, "_own_seconds", lambda: clock["own"])
    monkeypatch.setattr(others.time, "perf_counter", lambda: clock["now"])
    watched = Others()
    clock.update(busy=118.0, own=22.0, now=60.0)  # 18 s busy, 15 of them ours, in 10 s
    assert watched.cores() == 0.3
    clock.update(own=30.0)  # ours is counted a tick later than the machine's
    assert watched.cores() == 0.0
    clock.update(own=22.0)
    watched.stop()
    clock.update(own=0.0, now=99.0)  # a server has ended, and nobody knows its time any more
    assert watched.cores() == watched.document()["others_cores"] == 0.3


def test_doubt() -> None:
    assert doubt({"others_cores": 0.05, "cores": 2, "load_average": 9.0}) == ""
    assert "took 0.5 of 2 cores" in doubt({"others_cores": 0.5, "cores": 2, "load_average": 0.0})
