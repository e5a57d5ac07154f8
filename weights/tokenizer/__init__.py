"""Tokenizer files of a checkpoint into those of a model directory, or a refusal."""
