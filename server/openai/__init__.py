"""What OpenAI's clients send and read under /v1: bodies in, bodies and streams out."""
