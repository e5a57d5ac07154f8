"""Ropeway over HTTP, and its command line. Imports engine, never PyTorch."""
