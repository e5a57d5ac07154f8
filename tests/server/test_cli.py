"""The command line: what it refuses, what it says, and what it does not load."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from engine.messages import EngineReady
from server.cli import app
from server.terminal.panel import cache_line, show, url_of
from server.terminal.sizes import format_size, parse_size
from tests.server.fake_engine import READY

runner = CliRunner()


@pytest.mark.parametrize(
    "module", ["server", "server.app", "server.cli", "server.processes.worker"]
)
def test_importing_does_not_load_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-num-seqs", "0"], ["--max-num-seqs", "at least 1", "got 0"]),
        (["--max-num-batched-tokens", "8"], ["--max-num-batched-tokens", "at least 64", "8"]),
        (["--block-size", "48"], ["--block-size", "16, 32 or 64", "48"]),
        (["--threads", "0"], ["--threads", "at least 1"]),
        (["--kv-memory", "0"], ["--kv-memory", "at least 1"]),
        (["--kv-memory", "lots"], ["--kv-memory", "512MiB", "lots"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--dtype", "float16"], ["--dtype", "float16"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--max-queue", "-1"], ["--max-queue"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_bad_value_names_its_option(
    tiny_model_dir: Path, options: list[str], words: list[str]
) -> None:
    result = runner.invoke(app, ["serve", str(tiny_model_dir), *options])
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr, result.stderr


def test_environment_variables_are_options(tiny_model_dir: Path) -> None:
    environment = {"ROPEWAY_SERVE_MAX_NUM_SEQS": "0"}
    result = runner.invoke(app, ["serve", str(tiny_model_dir)], env=environment)
    assert result.exit_code == 2
    assert "--max-num-seqs" in result.stderr


def test_no_model(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for directory, words in ((missing, "no such file or directory"), (tmp_path, "no weights")):
        result = runner.invoke(app, ["serve", str(directory)])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert str(directory) in result.stderr
        assert words in result.stderr


def test_port_in_use(tiny_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = runner.invoke(app, ["serve", str(tiny_model_dir), "--port", port])
    assert result.exit_code == 1
    assert result.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_help_and_version() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "generate", "bench", "train"):
        assert command in result.stdout
    assert runner.invoke(app, ["--version"]).stdout.startswith("ropeway ")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("2 GiB", 2 << 30), ("1.5gb", 1_500_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "5 apples", "1e9", "2G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_size(text)


def test_sizes_are_readable() -> None:
    assert [format_size(size) for size in (5, 1 << 20, 1536 << 20)] == [
        "5 bytes",
        "1 MiB",
        "1.5 GiB",
    ]


def cache(num_blocks: int, max_num_seqs: int) -> EngineReady:
    ready = READY
    return EngineReady(
        **{name: getattr(ready, name) for name in ready.__struct_fields__}
        | {
            "num_blocks": num_blocks,
            "block_size": 64,
            "max_position": 1024,
            "max_num_seqs": max_num_seqs,
        }
    )


@pytest.mark.parametrize(
    ("num_blocks", "max_num_seqs", "words"),
    [
        (512, 64, "512 pages of 64 tokens: 64 sequences of 512"),
        (4096, 64, "64 sequences of 1,024"),
        (8, 64, "8 sequences of 64"),
    ],
)
def test_what_the_cache_means(num_blocks: int, max_num_seqs: int, words: str) -> None:
    assert words in cache_line(cache(num_blocks, max_num_seqs))


def test_the_panel_says_what_graphs_there_are_only_where_there_are_some() -> None:
    console = Console(record=True, width=100)
    show(console, READY, "127.0.0.1", 8000, 1.0)
    assert "graphs" not in console.export_text()
    ready = msgspec.structs.replace(READY, graphs="9 of 13 batch sizes up to 256 recorded")
    show(console, ready, "127.0.0.1", 8000, 1.0)
    assert "graphs     9 of 13 batch sizes up to 256 recorded" in console.export_text()


def test_urls_work_on_this_machine() -> None:
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 80) == "http://[::1]:80"
