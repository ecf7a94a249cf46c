"""The paper's analyses on small models that are trained on the spot."""
