"""What people meet at a terminal: options, panels, exit codes, and the commands without a server."""
