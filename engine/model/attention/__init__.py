"""Attention over pages, one backend per kind of machine."""
