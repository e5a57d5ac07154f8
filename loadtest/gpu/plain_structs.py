"""Stands in for msgspec where it is not installed: structs as dataclasses, which nothing encodes.

For `make gpu-check`, on machines that have PyTorch and little else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class _Meta(type):
    """Makes a dataclass of every struct; what is said of its encoding means nothing here."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **settings: object
    ) -> Any:
        for each in namespace.get("__annotations__", {}):
            if isinstance(default := namespace.get(each), list | dict):
                namespace[each] = field(default_factory=type(default))
        made = super().__new__(cls, name, bases, namespace)
        if not bases:
            return made
        chosen = {key: bool(settings[key]) for key in ("frozen", "kw_only") if key in settings}
        return dataclass(**chosen)(made)

    def __init__(cls, *args: Any, **_: object) -> None:
        super().__init__(*args)


class Struct(metaclass=_Meta):
    """msgspec.Struct."""


structs = SimpleNamespace(force_setattr=object.__setattr__)
"""msgspec.structs."""
