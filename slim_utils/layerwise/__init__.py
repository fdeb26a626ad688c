"""The layer-wise pass over a model."""
