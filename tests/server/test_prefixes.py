"""Prefixes that an operator declares: what the files mean, and what two keys share by them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError
from server.access.keys import new_key
from server.chat import PLAIN, ChatTemplate
from server.prefixes import read_prefix
from server.terminal.panel import shared_line
from tests.models import tiny_config, write_model
from tests.patience import PATIENCE
from tests.server.fake_engine import EOS, byte_tokenizer
from tests.server.processes.test_serve import COMMAND, OPTIONS, Server, serve
from tests.server.test_chat import CHATML

SYSTEM = "You are a ship's cook who knows no weather. "
MESSAGES = [{"role": "system", "content": SYSTEM}]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_text_is_the_tokens_that_a_prompt_of_it_has(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "system.txt", " Ähm <|end|>\n")
    prefix = read_prefix(path, tokenizer, ChatTemplate(PLAIN, tokenizer))
    assert bytes(prefix.token_ids).decode() == " Ähm <|end|>\n"  # no special token
    assert prefix.name == str(path)
    assert shared_line(prefix, 4) == f"12 of 14 tokens (3 pages) of {path}"
    assert shared_line(prefix, 7) == f"14 of 14 tokens (2 pages) of {path}"


@pytest.mark.parametrize(
    ("template", "head", "tail"),
    [
        (PLAIN, "System: ", "\n\nUser: "),
        (CHATML, "<|start|>system\n", "<|end|>\n<|start|>user\n"),
        # Some write the system's turn into the user's.
        ("[{{ messages[0].content }}] {{ messages[1].content }} /", "[", "] "),
    ],
)
def test_messages_are_what_every_conversation_begins_with(
    tmp_path: Path, template: str, head: str, tail: str
) -> None:
    tokenizer = byte_tokenizer()
    chat = ChatTemplate(template, tokenizer, constants={"eos_token": "<|end|>"})
    prefix = read_prefix(write(tmp_path / "system.json", MESSAGES), tokenizer, chat)
    said = SYSTEM.strip() if template is CHATML else SYSTEM
    parts = (head + said + tail).split("<|end|>")
    expected = [*parts[0].encode()]
    for part in parts[1:]:
        expected += [EOS, *part.encode()]
    assert [*prefix.token_ids] == expected
    for said in ("Hi", "0", "", " a"):
        token_ids = chat.token_ids([*MESSAGES, {"role": "user", "content": said}])
        assert token_ids[: len(expected)] == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", [], "must be a list of messages"),
        ("a.json", {"role": "system", "content": "a"}, "must be a list of messages"),
        ("a.json", [{"role": "tool", "content": "a"}], "roles system, user, assistant"),
        ("a.json", [{"role": "system", "content": 1}], "and texts"),
        ("a.json", [{"role": "system"}], "must be a list"),
        ("a.json", [*MESSAGES, {"role": "user", "content": "a"}], "must not end with a user's"),
        ("b.json", MESSAGES, "cannot be rendered by the model's chat template: no system"),
        ("b", None, "cannot be read"),
    ],
)
def test_files_that_say_nothing_clear_are_refused(
    tmp_path: Path, name: str, content: object, words: str
) -> None:
    tokenizer = byte_tokenizer()
    refusing = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    chat = ChatTemplate(refusing if name == "b.json" else PLAIN, tokenizer)
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_prefix(path, tokenizer, chat)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must have at least one page of 64 tokens (block_size)"),
        ("x" * 63, "got 63 tokens"),
        ("x" * 193, "must fit the context of 192 tokens, got 193"),
    ],
)
def test_what_could_never_be_of_use_stops_the_start(
    tiny_model_dir: Path, tmp_path: Path, text: str, words: str
) -> None:
    path = write(tmp_path / "system.txt", text)
    command = [*COMMAND, "serve", str(tiny_model_dir), *OPTIONS, "--shared-prefix-file", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert str(path) in ended.stderr


ALICE, ALICE_KEY = new_key("alice", None, None)
BOB, BOB_KEY = new_key("bob", None, None)
PROMPT = SYSTEM * 3
"""Some pages of 32 tokens."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "model").mkdir()
    write_model(folder / "model", tiny_config(max_position=512))
    keys = write(folder / "keys", f"{ALICE_KEY.line}\n{BOB_KEY.line}\n")
    text = write(folder / "system.txt", PROMPT)
    turns = write(folder / "turns.json", [{"role": "system", "content": PROMPT}])
    files = ["--shared-prefix-file", str(text), "--shared-prefix-file", str(turns)]
    options = ["--block-size", "32", "--api-key-file", str(keys), *files]
    with serve(folder / "model", *options) as server:
        yield server


def cached(server: Server, secret: str, path: str, body: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and of them those that were found."""
    answer = httpx.post(
        server.url + path,
        json=body | {"max_tokens": 1},
        headers={"Authorization": f"Bearer {secret}"},
        timeout=PATIENCE,
        trust_env=False,
    )
    usage = answer.raise_for_status().json()["usage"]
    details = usage.get("prompt_tokens_details", usage)
    return usage["prompt_tokens"], details["cached_tokens"]


def pages(server: Server, secret: str, text: str) -> int:
    """Whole pages of a text that hold it alone."""
    count = len(
        httpx.post(
            f"{server.url}/tokenize",
            json={"text": text},
            headers={"Authorization": f"Bearer {secret}"},
            timeout=PATIENCE,
            trust_env=False,
        ).json()["token_ids"]
    )
    return count // 32


def test_two_keys_share_the_declared_text_and_nothing_else(guarded: Server) -> None:
    declared = 32 * pages(guarded, ALICE, PROMPT)
    assert declared >= 64
    assert f"tokens ({declared // 32} pages) of" in guarded.shown
    body = {"prompt": PROMPT + "And " + "it rains. " * 16, "stream": False}
    length, first = cached(guarded, ALICE, "/generate", body)
    whole = (length - 1) // 32 * 32
    assert first == 0
    assert whole > declared + 32
    assert cached(guarded, ALICE, "/generate", body)[1] == whole
    assert cached(guarded, BOB, "/generate", body)[1] == declared
    assert cached(guarded, BOB, "/generate", body)[1] == whole
    # A salt of the client's own begins where the declared prefix ends, too.
    assert cached(guarded, BOB, "/generate", body | {"cache_salt": "x"})[1] == declared
    assert cached(guarded, ALICE, "/v1/completions", body | {"model": "model"})[1] == whole
    other = {"prompt": "x" + body["prompt"], "stream": False}
    assert cached(guarded, ALICE, "/generate", other)[1] == 0
    assert cached(guarded, BOB, "/generate", other)[1] == 0


def test_two_keys_share_declared_messages(guarded: Server) -> None:
    turns = [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": "And does " + "it rain? " * 16},
    ]
    body = {"messages": turns, "model": "model"}
    length, first = cached(guarded, ALICE, "/v1/chat/completions", body)
    declared = 32 * pages(guarded, ALICE, f"System: {PROMPT}\n\nUser: ")
    whole = (length - 1) // 32 * 32
    assert first == 0
    assert whole > declared + 32
    assert cached(guarded, ALICE, "/v1/chat/completions", body)[1] == whole
    assert cached(guarded, BOB, "/v1/chat/completions", body)[1] == declared
