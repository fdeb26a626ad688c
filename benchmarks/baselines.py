"""Structured pruning of others, written anew from their papers to be measured beside this suite's.

How many go of each layer is given to the first two, and found by the third. Each takes a LLaMA with plain multi-head
attention or grouped queries and zeroes what it removes, in place; none updates other weights. Heads go as query heads,
or as equally many of every kv group where heads share a key/value head.

* magnitude: groups of least weight norm.
* Wanda-sp: ``|W| · ‖x‖`` averaged over outputs (Sun et al. 2024, structured as in An et al. 2024), each layer on the
  outputs of the pruned ones before it.
* FLAP (An et al., AAAI 2024), AL-AM with WIFV: variance of a channel times the squared norm of its column,
  standardised in each layer and compared over all of them, and a bias for the mean of what went.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask
from slim_utils.params_remove import expand, zero_layer, zero_removed

# Units of heads and FFN columns that go, of every layer.
Counts = list[list[int]]


class ChannelStatistics:
    """Mean, variance and norm of every input channel of a linear map, in fp64.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Take a batch (…, channels) in."""
        tokens = inputs.flatten(0, -2).double().cpu()
        self.count += len(tokens)
        self.sum += tokens.sum(0)
        self.squares += tokens.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """(channels,) mean."""
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        """(channels,) variance."""
        return self.squares / self.count - self.mean.square()

    @property
    def norm(self) -> Tensor:
        """(channels,) root of the sum of squares."""
        return self.squares.sqrt()


@torch.no_grad()
def prune_magnitude(model: PreTrainedModel, counts: Counts) -> list[LayerMask]:
    """Remove the heads and the columns of least norm over all their weights."""
    family, masks = find_family(model.config), []
    shapes = layer_shapes(model.config)
    for layer, shape, count in zip(family.decoder_layers(model), shapes, counts, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        heads = per_head(attention.o_proj.weight.square().sum(0), shape)
        heads = heads + per_head(attention.q_proj.weight.square().sum(1), shape)
        columns = mlp.down_proj.weight.square().sum(0)
        columns = columns + mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
        masks.append(lowest_go(shape, heads, columns, *count))
    zero_removed(model, family, masks)
    return masks


@torch.no_grad()
def prune_wanda_sp(
    model: PreTrainedModel, samples: Tensor, counts: Counts, settings: PruningSettings
) -> list[LayerMask]:
    """Wanda's structured form, each layer on the outputs of the pruned ones before it."""
    family, masks = find_family(model.config), []
    planned = zip(layer_shapes(model.config), counts, strict=True)

    def prune(layer: nn.Module, attention: ChannelStatistics, mlp: ChannelStatistics) -> None:
        shape, count = next(planned)
        heads = (layer.self_attn.o_proj.weight.abs().double() * attention.norm).mean(0)
        columns = (layer.mlp.down_proj.weight.abs().double() * mlp.norm).mean(0)
        masks.append(lowest_go(shape, per_head(heads, shape), columns, *count))
        zero_layer(layer, family, masks[-1])

    walk_with_statistics(model, samples, settings, prune)
    return masks


@torch.no_grad()
def prune_flap(model: PreTrainedModel, samples: Tensor, share: float, settings: PruningSettings) -> list[LayerMask]:
    """FLAP: about ``share`` of the block weights, wherever the standardised scores are lowest; with its biases."""
    family, shapes = find_family(model.config), layer_shapes(model.config)
    layers, statistics, scores = family.decoder_layers(model), [], []

    def score(layer: nn.Module, attention: ChannelStatistics, mlp: ChannelStatistics) -> None:
        statistics.append((attention, mlp))
        channels = attention.variance * layer.self_attn.o_proj.weight.double().square().sum(0)
        columns = mlp.variance * layer.mlp.down_proj.weight.double().square().sum(0)
        shape = shapes[len(scores)]
        # The authors' code squares the metric of the attention, and standardises channels before a head's mean.
        heads = per_head(standardised(channels.square()), shape) / shape.head_dim
        scores.append((heads, standardised(columns)))

    walk_with_statistics(model, samples, settings, score)
    counts = least_units(scores, shapes, layers, share)
    masks = []
    for layer, shape, own, count, (attention, mlp) in zip(layers, shapes, scores, counts, statistics, strict=True):
        mask = lowest_go(shape, *own, *count)
        gone = mask.removed()
        compensate_by_bias(layer.self_attn.o_proj, attention.mean, expand(gone.kept_heads, shape.head_dim))
        compensate_by_bias(layer.mlp.down_proj, mlp.mean, expand(gone.kept_columns, 1))
        zero_layer(layer, family, mask)
        masks.append(mask)
    return masks


def least_units(
    scores: list[tuple[Tensor, Tensor]], shapes: list[LayerShape], layers: nn.ModuleList, share: float
) -> list[tuple[int, int]]:
    """Head units and columns of every layer that go when those of least standardised score do, up to ``share``."""
    parts, costs = [], []
    for (heads, columns), shape, layer in zip(scores, shapes, layers, strict=True):
        units = unit_scores(heads, shape)
        parts += [units, columns]
        # Of each unit: rows of the queries and columns of the output, and keys and values where they go too.
        maps = 2 * shape.num_kv_heads if shape.heads_per_group > 1 else 4
        hidden = layer.mlp.down_proj.out_features
        costs += [torch.full((len(units),), hidden * shape.head_dim * maps), torch.full((len(columns),), hidden * 3)]
    order = torch.cat(parts).argsort()
    removed = torch.cat(costs)[order].cumsum(0).double() / sum(layer_weights(layer) for layer in layers)
    gone = torch.zeros(len(order), dtype=torch.long)
    gone[order[: int((removed - share).abs().argmin()) + 1]] = 1
    counts = [int(part.sum()) for part in gone.split([len(part) for part in parts])]
    return list(zip(counts[::2], counts[1::2], strict=True))


def layer_weights(layer: nn.Module) -> int:
    """Weights of the attention and MLP matrices of a layer."""
    return sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))


def compensate_by_bias(linear: nn.Linear, mean: Tensor, removed: Tensor) -> None:
    """Give ``linear`` the bias that makes up for the mean of its ``removed`` inputs."""
    bias = (linear.weight[:, removed].double() @ mean[removed]).to(linear.weight.dtype)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)


def walk_with_statistics(
    model: PreTrainedModel,
    samples: Tensor,
    settings: PruningSettings,
    visit: Callable[[nn.Module, ChannelStatistics, ChannelStatistics], None],
) -> None:
    """Visit every layer with the statistics of what its two output maps are given; then run it as it was left."""
    family = find_family(model.config)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_kwargs(model, layers, samples, settings)
    for layer, call in zip(layers, calls, strict=True):
        replay = LayerForward(layer, family, hidden, call, settings)
        attention = gather(layer.get_submodule(family.attention_out), replay.attention_inputs())
        replay.finish_attention()
        mlp = gather(layer.get_submodule(family.mlp_out), replay.column_inputs())
        visit(layer, attention, mlp)
        LayerForward(layer, family, hidden, call, settings).advance()


def gather(linear: nn.Linear, batches: Iterable[Tensor]) -> ChannelStatistics:
    """Statistics of the inputs of ``linear``."""
    statistics = ChannelStatistics(linear.in_features)
    for batch in batches:
        statistics.add(batch)
    return statistics


def per_head(channels: Tensor, shape: LayerShape) -> Tensor:
    """Sum of each head's (heads,) from (heads · head_dim,) channels."""
    return channels.view(shape.num_heads, shape.head_dim).sum(1)


def unit_scores(heads: Tensor, shape: LayerShape) -> Tensor:
    """Scores of what can go one after another: heads or, of shared ones, the lowest left of each kv group together."""
    if shape.heads_per_group == 1:
        return heads
    return heads.view(shape.num_kv_heads, -1).sort(dim=1).values.mean(0)


def lowest_go(shape: LayerShape, heads: Tensor, columns: Tensor, units: int, num_columns: int) -> LayerMask:
    """The mask without the lowest ``units`` of heads (of every kv group's, where shared) and ``num_columns`` columns.

    At least one of each stays.
    """
    groups = shape.num_kv_heads if shape.heads_per_group > 1 else 1
    by_group = heads.view(groups, -1)
    units, num_columns = min(units, by_group.shape[1] - 1), min(num_columns, len(columns) - 1)
    offsets = torch.arange(groups)[:, None] * by_group.shape[1]
    kept_heads = (by_group.argsort(dim=1)[:, units:] + offsets).flatten().sort().values
    kept_columns = columns.argsort()[num_columns:].sort().values
    return LayerMask.from_heads(shape, kept_heads.tolist(), kept_columns.tolist())


def standardised(scores: Tensor) -> Tensor:
    """Scores of mean 0 and variance 1."""
    return (scores - scores.mean()) / scores.std()
