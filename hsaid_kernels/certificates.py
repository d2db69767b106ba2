"""Bounds on the error on new data, by the bits of a packed task (docs/certificates.md)."""

from hsaid_kernels.app.certificate import Certificate, certified

__all__ = ["Certificate", "certified"]
