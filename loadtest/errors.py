"""What ends a measurement."""

from __future__ import annotations

from engine.errors import RopewayError


class Unmeasurable(RopewayError):
    """A server that cannot be started or reached, refuses, or does not send what was asked for."""

    code = "unmeasurable"
