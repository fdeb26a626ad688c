"""Sizes of a model: parameters, multiply-accumulates, and the share of the block weights that a pruning removes."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from slim_utils.families import Family
from slim_utils.params_remove import kept_indices
from slim_utils.pruning_record import LayerMask


def count_parameters(model: nn.Module) -> int:
    """Parameters of ``model``; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(config: PreTrainedConfig, seq_len: int = 64) -> int:
    """Multiply-accumulates of one forward on (1, ``seq_len``) tokens, logits included, by torch's own counter.

    Nothing is computed: the model is built without storage. Attention counts the whole ``seq_len``² square.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # Eager attention is made of matrix products, which the counter knows on every device.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        tokens = torch.zeros(1, seq_len, dtype=torch.long)
        # A mask of four dimensions is taken as it is; making one would look at values, which are not there.
        mask = torch.zeros(1, 1, seq_len, seq_len)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return counter.get_total_flops() // 2


def removed_share(layers: nn.ModuleList, family: Family, masks: list[LayerMask]) -> float:
    """Share of the block weights (attention and MLP matrices of all layers) that ``masks`` remove.

    Args:
        layers: decoder layers in their shapes before removal.
        family: their row of the table.
        masks: a mask a layer.
    """
    total = removed = 0.0
    for layer, mask in zip(layers, masks, strict=True):
        for name, (dim, kept) in kept_indices(family, mask).items():
            weight = layer.get_submodule(name).weight
            total += weight.numel()
            removed += weight.numel() * (1 - len(kept) / weight.shape[dim])
    return removed / total
