"""The Triton backend: for GPUs without nvcc at hand, or of another make than NVIDIA.

Only hsaid_kernels/ops.py asks for it, and only when it is used: Triton takes a second to import.
"""
