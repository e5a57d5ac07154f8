"""What the tests cannot do in a minute, proved by a command each: see the Makefile."""
