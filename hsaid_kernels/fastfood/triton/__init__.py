"""The Triton backend: for GPUs without nvcc at hand, or of another make than NVIDIA.

Only fastfood/ops.py asks for it, and only when it is used: Triton takes a second to import.
"""
