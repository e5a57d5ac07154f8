"""`make gpu-check`: the CUDA path checked and measured where there is PyTorch and little else."""
