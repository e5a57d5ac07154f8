"""Who takes part in a comparison, on which files: ours first, then who is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import Quantize
from loadtest.errors import Unmeasurable
from loadtest.gguf import Kind, write_gguf
from loadtest.peers import huggingface
from loadtest.peers.base import Absent, Offline, Serving
from loadtest.peers.llama_cpp import LlamaBatchedBench, LlamaServer
from loadtest.peers.ours import OursOffline, OursServing
from loadtest.peers.vllm import VllmServing
from loadtest.roofline import Sizes
from loadtest.workload import Workload

PeerName = Literal["llama.cpp", "transformers", "vllm"]


@dataclass(frozen=True)
class Tools:
    """Executables of peers; None where there is none."""

    batched_bench: Path | None
    llama_server: Path | None
    vllm: Path | None


@dataclass(frozen=True)
class Comparison:
    """What is compared: the shape of the streams, and how often.

    quantize: ours. kinds: of llama.cpp's weights.
    """

    model: Path
    dtype: Literal["float32", "bfloat16"]
    quantize: Quantize
    peers: Sequence[PeerName]
    kinds: Sequence[Kind]
    streams: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    prefill_tokens: int
    repeats: int
    threads: int

    @property
    def context(self) -> int:
        """Tokens of one stream."""
        return self.prompt_tokens + self.output_tokens

    def workload(self, streams: int, vocab_size: int) -> Workload:
        """Of so many streams."""
        return Workload(streams, self.prompt_tokens, self.output_tokens, vocab_size)


@dataclass(frozen=True)
class Files:
    """The same weights as others read them."""

    neox: Path
    gguf: dict[Kind, Path]


def write_files(model: Path, kinds: Sequence[Kind], folder: Path) -> Files:
    """Convert the model into `folder`. Raises Unmeasurable where it cannot leave."""
    neox = folder / "neox"
    command = [sys.executable, "-P", "-m", "server.cli", "convert", str(model), str(neox)]
    ended = subprocess.run(
        [*command, "--to", "gpt-neox"], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise Unmeasurable(f"{model} cannot be converted to GPT-NeoX: {ended.stderr.strip()}")
    files = Files(neox, {kind: folder / f"{kind}.gguf" for kind in kinds})
    for kind, path in files.gguf.items():
        write_gguf(neox, path, kind)
    return files


def offline_peers(
    each: Comparison, sizes: Sizes, files: Files, tools: Tools
) -> tuple[list[Offline], list[Absent]]:
    """Ours first, then who is there; and who is not."""
    ours = OursOffline(each.model, each.dtype, each.quantize, each.threads, sizes.vocab_size)
    present: list[Offline] = [ours]
    absent = []
    if "llama.cpp" in each.peers:
        if tools.batched_bench is None:
            absent.append(Absent("llama.cpp offline", "no llama-batched-bench on PATH; name one"))
        else:
            for kind, gguf in files.gguf.items():
                present.append(LlamaBatchedBench(tools.batched_bench, gguf, kind, each.threads))
    if "transformers" in each.peers:
        if not huggingface.INSTALLED:
            absent.append(Absent("transformers", "pip install transformers"))
        else:
            model = huggingface.load(files.neox, each.dtype)
            present.append(huggingface.Generate(model, each.threads, sizes.vocab_size))
            most = max(each.streams)
            present.append(huggingface.ContinuousBatching(model, each.threads, most, each.context))
    return present, absent


def serving_peers(
    each: Comparison, files: Files, tools: Tools
) -> tuple[list[Serving], list[Absent]]:
    """Ours first, then who is there; and who is not."""
    present: list[Serving] = [OursServing(each.model, each.dtype, each.quantize, each.threads)]
    absent = []
    most = max(each.streams)
    sizes = (each.threads, most, each.context)
    if "llama.cpp" in each.peers:
        if tools.llama_server is None:
            absent.append(Absent("llama.cpp over HTTP", "no llama-server on PATH; name one"))
        else:
            for kind, gguf in files.gguf.items():
                present.append(LlamaServer(tools.llama_server, gguf, kind, *sizes))
    if "vllm" in each.peers:
        if tools.vllm is None:
            absent.append(Absent("vllm", "no executable; name one with --vllm"))
        else:
            present.append(VllmServing(tools.vllm, files.neox, each.dtype, *sizes))
    return present, absent
