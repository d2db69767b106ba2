"""The command line `hsaid` and its training data."""
