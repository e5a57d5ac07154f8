"""The HTTP process's half of the engine; no PyTorch."""
