"""The processes of `ropeway serve`: their sockets, their start, their work, their end."""
