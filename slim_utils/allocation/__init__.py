"""Allocation of the pruning target to the layers."""
