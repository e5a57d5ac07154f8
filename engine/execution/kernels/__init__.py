"""Triton kernels. Importing one of its modules imports Triton; only CUDA does."""
