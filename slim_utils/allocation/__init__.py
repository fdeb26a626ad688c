"""How much of each layer is pruned."""
