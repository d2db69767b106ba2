"""A person: the command line, and what it trains on."""
