"""Measures what the engine and the server do: `ropeway bench`."""
