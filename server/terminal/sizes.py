"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5 GB" or "1048576". Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    unit = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in unit:
        raise ValueError(f"expected bytes or a size such as 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * unit[match[2].lower()])


def format_size(size: int) -> str:
    """Bytes in the largest binary unit that leaves at least one of it."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
