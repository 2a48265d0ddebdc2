"""Kernels in Triton for CUDA devices of compute capability 7.0 or newer."""
