"""`ropeway chat`, piped and in a terminal, with a small random model."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from engine.errors import ContextOverflow
from engine.llm import LLM
from engine.params import SamplingParams
from engine.scaling import RopeScaling
from server.chat import PLAIN, ChatTemplate
from server.terminal.conversation import Conversation
from server.terminal.options import rope_option
from tests.patience import PATIENCE

COMMAND = [sys.executable, "-P", "-c", "from server.cli import main; main()", "chat"]
OPTIONS = ["--dtype", "float32", "--threads", "1", "--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM(tiny_model_dir, dtype="float32", threads=1, max_num_seqs=1)


def conversation(llm: LLM, max_tokens: int = 8) -> Conversation:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Conversation(llm, ChatTemplate(PLAIN, llm.tokenizer), params)


def test_each_answer_knows_what_was_said(llm: LLM) -> None:
    talk = conversation(llm)
    first = "".join(talk.answer("the a"))
    second = "".join(talk.answer("and now"))
    prompt = f"User: the a\n\nAssistant: {first.rstrip()}\n\nUser: and now\n\nAssistant:"
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    [expected] = llm.generate([prompt], params)
    assert second == expected.text.lstrip()
    talk.reset()
    assert "".join(talk.answer("the a")) == first


def test_what_was_said_until_one_leaves_is_kept(llm: LLM) -> None:
    talk = conversation(llm, max_tokens=50)
    answer = talk.answer("the a")
    said = next(answer) + next(answer)
    answer.close()
    assert talk.messages == [
        {"role": "user", "content": "the a"},
        {"role": "assistant", "content": said.rstrip()},
    ]
    assert llm.stats.running == 0


def test_the_oldest_turns_are_forgotten(llm: LLM) -> None:
    talk = conversation(llm)
    forgotten = 0
    for turn in range(30):
        "".join(talk.answer(f"message {turn}"))
        forgotten += talk.forgotten
    assert forgotten > 0
    assert len(talk.messages) == 60 - forgotten
    assert talk.messages[0] == {"role": "user", "content": f"message {forgotten // 2}"}


def test_a_message_without_room_changes_nothing(llm: LLM) -> None:
    talk = conversation(llm)
    "".join(talk.answer("the a"))
    before = list(talk.messages)
    with pytest.raises(ContextOverflow, match=r"prompt has \d+ tokens; the context takes"):
        next(talk.answer("many words " * 1000))
    assert talk.messages == before


def piped(directory: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--model", str(directory), *OPTIONS, *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_piped_lines_are_turns(tiny_model_dir: Path, llm: LLM) -> None:
    text = "the a\n\n/help\n/what\nand now\n/reset\nthe a\n"
    done = piped(tiny_model_dir, text, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    talk = conversation(llm)
    first, second = ("".join(talk.answer(each)) for each in ("the a", "and now"))
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert "Ctrl-C stops an answer" in done.stderr
    assert "/what is no command" in done.stderr


def test_a_piped_line_without_room_fails(tiny_model_dir: Path) -> None:
    done = piped(tiny_model_dir, "many words " * 1000)
    assert done.returncode == 2
    assert re.fullmatch(r"error: prompt has \d+ tokens; the context takes \d+\n", done.stderr)


@dataclass
class Terminal:
    """The other end of a pseudo-terminal."""

    process: subprocess.Popen[bytes]
    fd: int
    shown: str = field(default="")

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def until(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Read until a pattern is shown; what was shown up to it, and forget it."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self.fd, 4096).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def interrupt_until(self, pattern: str) -> None:
        """SIGINT at a prompt. Python's readline shows the prompt, then calls select(): a signal
        between the two is seen with the next one, or with the next key."""
        for _ in range(12):
            self.process.send_signal(signal.SIGINT)
            if select.select([self.fd], [], [], 5)[0]:
                break
        self.until(pattern)


@contextmanager
def terminal(directory: Path, *options: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    os.set_blocking(theirs, True)
    process = subprocess.Popen(
        [*COMMAND, "--model", str(directory), *OPTIONS, *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_in_a_terminal(tiny_model_dir: Path) -> None:
    with terminal(tiny_model_dir, "--max-tokens", "0") as screen:
        screen.until("Ctrl-D leaves.*\n> ")
        screen.type("the a\n")
        screen.until("the a\r\n.")  # it answers, and would until the context is full
        screen.process.send_signal(signal.SIGINT)
        screen.until("\n> ")
        screen.type("/reset\n")
        screen.until("is forgotten.*\n> ")
        screen.type("many words " * 300 + "\n")
        screen.until("error: prompt has .* tokens; the context takes .*\n> ")
        screen.interrupt_until("Ctrl-D leaves.*\n> ")
        screen.type("\x04")
        assert screen.process.wait(PATIENCE) == 0


def test_the_shell_completes(tmp_path: Path) -> None:
    environment = os.environ | {
        "_ROPEWAY_COMPLETE": "complete_bash",
        "COMP_WORDS": "ropeway ch",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv[0] = 'ropeway'; from server.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["chat"]


def test_options_stretch_the_rotation(tiny_model_dir: Path) -> None:
    """As the request field does, and both commands alike."""
    llm = LLM(tiny_model_dir, dtype="float32", threads=1, max_num_seqs=4)
    options = [*OPTIONS, "--model", str(tiny_model_dir), "--max-tokens", "150"]
    prompt = "the a" * 30  # with the answer, more than the context of 192
    for rope, scaling in (
        ("ntk:4", RopeScaling(type="ntk", factor=4)),
        ('{"type": "linear", "factor": 2}', RopeScaling(type="linear", factor=2)),
    ):
        params = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, rope=scaling)
        (expected,) = llm.generate([prompt], params)
        command = [*COMMAND[:-1], "generate", prompt, "--rope", rope, *options]
        said = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE).stdout
        assert said.decode() == expected.text + "\n"
    template = ChatTemplate(PLAIN, llm.tokenizer)
    turn = [{"role": "user", "content": prompt}]
    (expected,) = llm.generate([template.token_ids(turn)], params)
    piped = subprocess.run(
        [*COMMAND, "--rope", "linear:2", *options, "--stop", "no such text"],
        input=f"{prompt}\n".encode(),
        capture_output=True,
        check=True,
        timeout=PATIENCE,
    )
    assert piped.stdout.decode() == expected.text.lstrip() + "\n"


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ("foo", "rope.type must be one of"),
        ("ntk", "rope.factor is required for type ntk"),
        ("ntk:four", "could not convert string to float: 'four'"),
        ("ntk:0.5", "rope.factor must be at least 1, got 0.5"),
        ('{"type": "ntk", "factors": 4}', "factors"),
        ("{", "it is such as ntk:4, or JSON"),
        ("[4]", "rope.type must be one of"),
    ],
)
def test_what_is_no_rotation_is_refused(rope: str, words: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        rope_option(rope)
    assert words in str(caught.value)
    assert rope in str(caught.value)
