"""What `ropeway serve` shows once it can serve."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from engine.config import SharedPrefix
from engine.messages import EngineReady
from server.terminal.sizes import format_size

ANY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean every interface, and one that they have on this machine."""


def url_of(host: str, port: int, *, secure: bool = False) -> str:
    """A URL that works on this machine, also where the server listens on every interface."""
    host = ANY_INTERFACE.get(host, host)
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def cache_line(ready: EngineReady) -> str:
    """The cache's size and what it means."""
    sequences = min(ready.max_num_seqs, ready.num_blocks)
    length = min(ready.context, ready.num_blocks // sequences * ready.block_size)
    return (
        f"{ready.num_blocks:,} pages of {ready.block_size} tokens: "
        f"{sequences:,} sequences of {length:,} ({format_size(ready.kv_bytes)})"
    )


def shared_line(prefix: SharedPrefix, block_size: int) -> str:
    """What of a declared prefix is shared: its whole pages."""
    count = len(prefix.token_ids)
    pages = count // block_size
    return f"{pages * block_size:,} of {count:,} tokens ({pages:,} pages) of {prefix.name}"


def show(
    console: Console,
    ready: EngineReady,
    host: str,
    port: int,
    seconds: float,
    *,
    secure: bool = False,
    keys: bool = False,
    prefixes: Sequence[SharedPrefix] = (),
) -> None:
    """Print it. seconds: from the command to ready; secure: HTTPS; keys: API keys are needed;
    prefixes: what all of them share."""
    url = url_of(host, port, secure=secure)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    everywhere = f"  on every interface ({host})" if host in ANY_INTERFACE else ""
    for name, value in (
        ("url", f"{url}{everywhere}"),
        ("model", f"{ready.model}, {_millions(ready.num_parameters)} parameters"),
        ("context", f"{ready.context:,} tokens"),
        ("device", f"{ready.device}, {ready.dtype}, {ready.threads} threads"),
        ("products", ready.products),
        ("attention", ready.attention),
        *([("graphs", ready.graphs)] if ready.graphs else []),
        ("cache", cache_line(ready)),
        ("step", f"{ready.max_num_seqs:,} sequences, {ready.max_num_batched_tokens:,} tokens"),
        *(("shared", shared_line(each, ready.block_size)) for each in prefixes),
        *(("note", note) for note in ready.notes),
    ):
        table.add_row(name, Text(value))
    title = f"Ropeway, ready in {seconds:.1f} s"
    console.print(Panel(table, title=title, title_align="left", expand=False))
    body = """'{"prompt": "The old captain", "max_tokens": 64}'"""
    # Apart from the panel and never wrapped, so that it can be copied.
    key = '-H "Authorization: Bearer $KEY" ' if keys else ""
    console.print(f"curl -N {url}/generate {key}--json {body}", soft_wrap=True, markup=False)
    console.print("Ctrl-C drains and stops; a second one stops at once.", style="dim")
