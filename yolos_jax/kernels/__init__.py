"""Attention on a CPU: kernels that Numba compiles and XLA's programs call."""
