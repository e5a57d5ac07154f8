"""Decides what each step computes; no tensors, no PyTorch."""
