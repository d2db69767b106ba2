"""`HSAID`, which wraps a model: its trained parameters, its checkpoints, and tools for attention heads."""
