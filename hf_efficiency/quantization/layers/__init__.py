"""Storage layers: how packed weights are kept and multiplied."""
