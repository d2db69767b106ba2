"""What are the model's own tensors? W0: its values, its kinds, and what may be wrapped."""
