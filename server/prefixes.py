"""Beginnings of prompts that an operator declares to be shared by all keys: files."""

from __future__ import annotations

import json
from pathlib import Path

from engine.config import SharedPrefix
from engine.errors import ConfigError, InvalidRequest
from engine.frontend.tokenizer import Tokenizer
from server.chat import ChatTemplate

ROLES = ("system", "user", "assistant")


def read_prefix(path: Path, tokenizer: Tokenizer, chat: ChatTemplate) -> SharedPrefix:
    """The tokens of a file's text, exactly as a prompt would have them; or, of a .json file, those
    that a conversation begins with whose first messages it holds, before a user's turn.

    Raises ConfigError, naming the file.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"shared_prefix_file {path} cannot be read: {error}") from error
    try:
        if path.suffix == ".json":
            token_ids = chat.beginning(_messages(text))
        else:
            token_ids = tokenizer.encode(text)
    except (InvalidRequest, ValueError) as error:
        raise ConfigError(f"shared_prefix_file {path} {error}") from error
    return SharedPrefix(name=str(path), token_ids=tuple(token_ids))


def _messages(text: str) -> list[dict[str, str]]:
    """Raises ValueError."""
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            'must be a list of messages, such as [{"role": "system", "content": "..."}], with '
            f"roles {', '.join(ROLES)} and texts"
        )
    if messages[-1]["role"] == "user":
        raise ValueError("must not end with a user's message, since one follows")
    return messages


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in ROLES
        and isinstance(value["content"], str)
    )
