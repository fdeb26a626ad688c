"""Instruction data, LoRA and mask-preserving training of pruned models."""
