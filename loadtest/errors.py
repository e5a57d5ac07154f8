"""What ends a measurement."""


class Unmeasurable(Exception):
    """A server that cannot be started or reached, refuses, or does not send what was asked for."""
