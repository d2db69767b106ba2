"""A model: HSAID, what it trains, and its checkpoints."""
