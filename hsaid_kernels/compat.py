"""The interfaces of the published implementations (docs/migrating.md)."""

from hsaid_kernels.wrapper.compat import FastfoodWrap, intrinsic_dimension, intrinsic_dimension_said

__all__ = ["FastfoodWrap", "intrinsic_dimension", "intrinsic_dimension_said"]
