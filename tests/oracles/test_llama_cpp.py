"""Greedy tokens of llama.cpp on the GGUF file are ours: the same weights, read the same way."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from loadtest.bench.options import DEFAULT_MODEL
from loadtest.gguf import Kind, write_gguf
from loadtest.peers.llama_cpp import LlamaServer
from weights.convert import convert

BINARY = shutil.which("llama-server")
PROMPTS = ["The old captain", "It was a dark night", '"Yes," said she,', "Once upon a time"]
TOKENS = 32


@pytest.mark.skipif(BINARY is None, reason="no llama-server on PATH")
@pytest.mark.parametrize(("kind", "least"), [("f32", 1.0), ("bf16", 0.5)])
def test_greedy_tokens(tmp_path: Path, kind: Kind, least: float) -> None:
    """float32 agrees to the last token; bfloat16 rounds activations elsewhere, so later or never.

    least: the share of tokens before the first that differs.
    """
    assert BINARY is not None
    convert(DEFAULT_MODEL, tmp_path / "neox", "gpt-neox")
    write_gguf(tmp_path / "neox", tmp_path / "model.gguf", kind)
    llm = LLM(DEFAULT_MODEL, dtype="float32" if kind == "f32" else "bfloat16", threads=1)
    prompts: list[str | list[int]] = [llm.tokenizer.encode(text) for text in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    ours = [each.token_ids for each in llm.generate(prompts, params)]
    peer = LlamaServer(Path(BINARY), tmp_path / "model.gguf", kind, 1, 1, 256)
    alike = 0
    with peer.serve() as server:
        for prompt, wanted in zip(prompts, ours, strict=True):
            assert isinstance(prompt, list)
            body = server.dialect.body(prompt, TOKENS) | {"stream": False}
            request = urllib.request.Request(
                server.url + server.dialect.path,
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                theirs = json.load(response)["tokens"]
            assert len(theirs) == TOKENS
            pairs = zip(theirs, wanted, strict=True)
            alike += next((at for at, pair in enumerate(pairs) if len(set(pair)) > 1), TOKENS)
    assert alike >= least * TOKENS * len(PROMPTS)
