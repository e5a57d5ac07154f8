"""How long tests wait for what must happen."""

from __future__ import annotations

PATIENCE = 300.0
"""Seconds, many times what the slowest machine needs: only a test that fails waits so long."""
