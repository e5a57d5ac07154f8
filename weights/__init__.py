"""Checkpoints: how the default model is made; formats as data."""
