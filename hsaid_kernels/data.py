"""Labelled texts for classification, from Unicode CLDR or from files (docs/training.md)."""

from hsaid_kernels.app.data import DataError, Dataset, Example, load_cldr, load_files, read_examples

__all__ = ["DataError", "Dataset", "Example", "load_cldr", "load_files", "read_examples"]
