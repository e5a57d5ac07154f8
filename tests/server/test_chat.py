"""Chat templates: whose they are, and what they may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import InvalidRequest, TokenizerError
from server.chat import PLAIN_STOP, ChatTemplate
from tests.server.fake_engine import EOS, byte_tokenizer

CHATML = (
    "{% for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('no such role') }}\n"
    "    {%- endif %}\n"
    "{{ '<|start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": " Hi <b>there</b> "},
    {"role": "assistant", "content": "Hé"},
    {"role": "user", "content": "Bye"},
]


def test_it_renders_what_transformers_renders(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = byte_tokenizer()
    (expected,), _ = render_jinja_template(
        [TURNS], chat_template=CHATML, add_generation_prompt=True, eos_token="<|end|>"
    )
    token_ids = ChatTemplate.from_directory(tmp_path, tokenizer).token_ids(TURNS)
    assert token_ids.count(EOS) == 3
    parts = expected.split("<|end|>")
    ordinary = [token_id for token_id in token_ids if token_id != EOS]
    assert ordinary == [*"".join(parts).encode()]


def test_special_tokens_in_a_message_are_text() -> None:
    template = ChatTemplate("{{ messages[0].content }}<|end|>", byte_tokenizer())
    for text in ("<|end|>", "a<|end|><|end|>", "\ufdd0<|end|>"):
        token_ids = template.token_ids([{"role": "user", "content": text}])
        assert token_ids.index(EOS) == len(token_ids) - 1
        assert bytes(token_ids[:-1]).decode() == text.replace("\ufdd0", "\ufffd")


def test_the_config_file_may_hold_it(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}!", "bos_token": {"content": "<|end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_directory(tmp_path, byte_tokenizer())
    assert template.token_ids([]) == [EOS, ord("!")]
    assert template.stop == ()


def test_base_models_get_a_plain_one(tmp_path: Path) -> None:
    template = ChatTemplate.from_directory(tmp_path, byte_tokenizer())
    text = bytes(template.token_ids(TURNS[1:])).decode()
    assert text == "Assistant: Hé\n\nUser: Bye\n\nAssistant:"
    assert template.stop == PLAIN_STOP


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ nothing.here }}", "undefined"),
    ],
)
def test_what_cannot_be_rendered_is_refused(source: str, words: str) -> None:
    template = ChatTemplate(source, byte_tokenizer())
    with pytest.raises(InvalidRequest, match=words) as caught:
        template.token_ids(TURNS)
    assert caught.value.field == "messages"


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja:1"):
        ChatTemplate.from_directory(tmp_path, byte_tokenizer())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(TokenizerError, match="must be a text"):
        ChatTemplate.from_directory(tmp_path, byte_tokenizer())
