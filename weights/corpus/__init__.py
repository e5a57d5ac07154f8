"""Texts to train on: where they come from, as documents, as tokens."""
