"""From a conversation to a prompt: the model's chat template, or a plain one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest, TokenizerError
from engine.files import read_json
from engine.frontend.tokenizer import CONFIG_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}Assistant:"
)
"""For base models, which have seen dialogues but no markers of their own."""

PLAIN_STOP = ("\n\nUser:",)
"""With the plain template a model that goes on would write the user's next turn as well."""

BREAK = "\ufdd0"
"""A code point that Unicode has declared no character: it breaks what looks like a special token in
somebody's message, and is taken out again before that is tokenised."""


class ChatTemplate:
    """A Jinja2 template as Hugging Face's tokenizers have it, rendered in Jinja's sandbox.

    A special token is one only where the template writes it: its text in a message is text.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        constants: Mapping[str, str] | None = None,
    ) -> None:
        """stop: texts that end an answer; constants: bos_token and eos_token.

        Raises jinja2.TemplateSyntaxError.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.stop = stop
        self._template = environment.from_string(source)
        self._tokenizer = tokenizer
        self._constants = {"bos_token": "", "eos_token": ""} | dict(constants or {})
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """chat_template.jinja of a model directory, `chat_template` of its tokenizer_config.json,
        or the plain one. Raises TokenizerError, naming the file."""
        file, settings = directory / TEMPLATE_FILE, directory / CONFIG_FILE
        # Not every tokenizer has one.
        config = read_json(settings, TokenizerError) if settings.is_file() else {}
        where = file if file.is_file() else settings
        source = config.get("chat_template")
        if where == file:
            try:
                source = file.read_text("utf-8")
            except (OSError, ValueError) as error:
                raise TokenizerError(f"{file}: cannot be read: {error}") from error
        if source is None:
            return cls(PLAIN, tokenizer, stop=PLAIN_STOP)
        if not isinstance(source, str):
            raise TokenizerError(f"{where}: chat_template must be a text")
        constants = {name: _text(config.get(name)) for name in ("bos_token", "eos_token")}
        try:
            return cls(source, tokenizer, constants=constants)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"{where}:{error.lineno}: chat template: {error}") from error

    def token_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt for the assistant's next turn. Raises InvalidRequest."""
        turns = [
            {name: self._plain(text) for name, text in message.items()} for message in messages
        ]
        try:
            text = self._template.render(
                messages=turns, add_generation_prompt=True, **self._constants
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InvalidRequest(
                f"messages cannot be rendered by the model's chat template: {error}", "messages"
            ) from error
        token_ids: list[int] = []
        at = 0
        for match in self._special.finditer(text) if self._special else ():
            token_ids += self._encode(text[at : match.start()])
            token_ids.append(self._tokenizer.special_tokens[match[0]])
            at = match.end()
        return token_ids + self._encode(text[at:])

    def beginning(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """What every prompt begins with whose conversation begins with these messages and goes on
        with a user's. Raises InvalidRequest."""
        some, others = (
            self.token_ids([*messages, {"role": "user", "content": said}]) for said in ("a", "0")
        )
        same = takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False))
        return [token_id for token_id, _ in same]

    def _plain(self, text: str) -> str:
        """Break what looks like a special token."""
        text = text.replace(BREAK, "\ufffd")
        if self._special is None:
            return text
        return self._special.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text.replace(BREAK, ""))
        except ValueError as error:
            raise InvalidRequest(f"messages cannot be tokenised: {error}", "messages") from error


def _raise(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def _text(token: object) -> str:
    """A special token as tokenizer_config.json has it: a text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
