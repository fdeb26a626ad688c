"""Outputs of a run: checkpoints, records, model card, hub."""
