"""What people meet at a terminal: options, panels, exit codes, the commands without a server."""
