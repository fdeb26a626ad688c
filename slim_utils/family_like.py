"""--family_like: a row for a model type without one, checked on a random model before it is used."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models.families import REFUSED_TYPES
from models.like import add_row_like
from slim_utils.common.errors import UserError
from slim_utils.families import FAMILIES, find_family, layer_shapes, linear_map, unknown_type_message
from slim_utils.masks import LayerMask
from slim_utils.params_remove import num_indices, removed_indices, shrink, zero_heads, zero_indices

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slim_utils.families import Family, LayerShape

# The random model: the sizes of the real one, but this many layers and words.
NUM_LAYERS, VOCAB_SIZE = 2, 256
# Largest difference of logits, relative to the largest logit; a wrong layout differs by more than a tenth.
TOLERANCE = 1e-3
# Characters of the library's message, which may list every parameter.
MAX_REASON = 250


def add_family_like(config: PreTrainedConfig, like: str) -> None:
    """Add a row for the model type of ``config`` with the layout of family ``like``, if it computes the right thing.

    A random model of two layers loses heads and columns: zeroed in the columns of the output maps, it must compute what
    the pruned model does, in fp32 on the CPU.

    Args:
        config: configuration of the model to prune.
        like: value of ``--family_like``.

    Raises:
        UserError: if the type has a row of its own, ``like`` has none, or the layout does not fit.
    """
    family = FAMILIES.get(config.model_type)
    if family and not family.like:
        raise UserError(f"--family_like {like}: model type '{config.model_type}' is supported by itself; leave it out")
    if like not in FAMILIES:
        raise UserError(f"--family_like {like}: {unknown_type_message(like)}")
    if config.model_type in REFUSED_TYPES:
        raise UserError(f"--family_like {like}: {unknown_type_message(config.model_type)}")
    if FAMILIES[like].expert_columns_key:
        raise UserError(f"--family_like {like}: mixtures of experts need a row of their own in models/families.py")
    try:
        add_row_like(config.model_type if family is None else family.base_type, like)
    except ValueError as error:
        raise UserError(f"--family_like {like}: {error}") from None
    where = f"--family_like {like}: model type '{config.model_type}' does not have this layout"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            dense_change, difference = _logit_differences(_random_model(config))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Missing modules, other shapes, other classes of maps: whatever the library's class raises.
        raise UserError(f"{where}: {' '.join(str(error).split())[:MAX_REASON]}") from error
    if not difference <= TOLERANCE:
        raise UserError(f"{where}: the logits of the pruned and of the masked model differ by {difference:.2g}")
    if dense_change <= TOLERANCE:
        raise UserError(f"{where}: its logits do not depend on the units removed")


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    small, indices = copy.deepcopy(config), _tried_layers(config)
    for key, value in config.to_dict().items():
        # Lists with an entry per layer.
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, key, [value[index] for index in indices])
    small.num_hidden_layers = len(indices)
    small.vocab_size, small.pad_token_id = min(VOCAB_SIZE, config.vocab_size), None
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Large enough for every unit to matter, norms and biases too.
        nn.init.normal_(parameter, std=0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    return model


def _tried_layers(config: PreTrainedConfig) -> list[int]:
    """The first layers; in a hybrid, the last of them is one with heads."""
    layers = range(config.num_hidden_layers)
    *first, last = layers[:NUM_LAYERS]
    with_heads = (index for index in layers[last:] if FAMILIES[config.model_type].has_attention(config, index))
    return [*first, next(with_heads, last)]


def _logit_differences(model: PreTrainedModel) -> tuple[float, float]:
    """Differences of the masked model's logits from the dense and from the pruned model's, by the largest logit."""
    family, shapes = find_family(model.config), layer_shapes(model.config)
    masks = [_some_mask(index, shape) for index, shape in enumerate(shapes)]
    tokens = torch.randint(model.config.vocab_size, (2, 16))
    dense = model(tokens).logits
    pruned = shrink(model, family, masks)(tokens).logits
    for layer, mask in zip(family.decoder_layers(model), masks, strict=True):
        _zero_columns(layer, family, mask)
    masked = model(tokens).logits
    scale = masked.abs().max()
    return float((masked - dense).abs().max() / scale), float((masked - pruned).abs().max() / scale)


def _some_mask(index: int, shape: LayerShape) -> LayerMask:
    """A mask without every third column, without heads of every kv group or, in odd layers, without a whole one."""
    columns = [column for column in range(shape.num_columns) if column % 3 != index]
    size, groups = shape.num_heads // max(shape.head_groups, 1), shape.head_groups
    if size > 1 and (index % 2 == 0 or shape.head_blocks > 1):
        removed = {group * size + (group + index) % size for group in range(groups)}
        return LayerMask.from_heads(shape, [h for h in range(shape.num_heads) if h not in removed], columns)
    kept_groups = [group for group in range(groups) if group != index] if groups > 1 else list(range(groups))
    return LayerMask.from_groups(shape, kept_groups, columns)


def _zero_columns(layer: nn.Module, family: Family, mask: LayerMask) -> None:
    """Zero the columns of the output maps that ``mask`` removes, and nothing else, except for norms over all heads."""
    zero_heads(layer, family, mask)
    outputs = [f"{name}.weight" for name in (family.attention_out, family.mlp_out)]
    for name, (dim, indices) in removed_indices(family, mask).items():
        # A layer with another mixer of tokens has no output map of heads.
        if name in outputs and num_indices(indices):
            weight: Tensor = linear_map(layer, name.removesuffix(".weight")).weight
            zero_indices(weight, family.stored_dim(dim), indices)
