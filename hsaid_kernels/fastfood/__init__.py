"""Numbers: theta to weights and back, on every backend. Knows no layers and no models."""
