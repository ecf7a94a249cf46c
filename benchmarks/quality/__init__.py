"""How much of real specialists a merge keeps, by every method: ``python -m benchmarks.quality``."""
