"""The network, its rotations, its attention."""
