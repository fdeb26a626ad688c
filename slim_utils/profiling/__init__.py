"""Sizes, MACs and latency of models."""
