"""What a pruning run writes."""
