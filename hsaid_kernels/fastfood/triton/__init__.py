"""The Triton backend: for machines without nvcc, and for GPUs of other vendors than NVIDIA.

Only fastfood/ops.py imports it, and only when it is used, because importing Triton takes a second.
"""
