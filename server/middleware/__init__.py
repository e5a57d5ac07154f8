"""What every request passes before its route: id, key, log, traces, headers."""
