"""Other engines on the same weights, each run as its own makers would run it."""
