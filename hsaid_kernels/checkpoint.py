"""Finding checkpoints on disk."""

from hsaid_kernels.wrapper.checkpoint.files import last_checkpoint

__all__ = ["last_checkpoint"]
