"""Other structured pruning methods, reimplemented from their papers as baselines.

Each masks a LLaMA with multi-head or grouped-query attention in place; none updates the remaining weights. In
grouped-query attention, the same number of query heads is removed from every kv group. The number of units per layer is
an input of the first two methods; FLAP allocates them itself.

* magnitude: units with the smallest weight norm.
* Wanda-sp: ``|W| · ‖x‖`` averaged over outputs (Sun et al. 2024, structured as in An et al. 2024), with every layer
  calibrated on the outputs of the pruned layers before it.
* FLAP (An et al., AAAI 2024), AL-AM with WIFV: variance of a channel times the squared norm of its column,
  standardised per layer and compared across layers, with a bias for the mean of the removed channels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slim_utils.families import COLUMNS, HEADS, LayerShape, find_family, layer_shapes
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerMask
from slim_utils.params_remove import expand, zero_layer, zero_removed

# Number of head units and FFN columns to remove, per layer.
Counts = list[list[int]]


class ChannelStatistics:
    """Mean, variance and norm of every input channel of a linear map, in fp64.

    Args:
        channels: number of input channels.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Accumulate a batch (…, channels)."""
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
        """(channels,) L2 norm."""
        return self.squares.sqrt()


@torch.no_grad()
def prune_magnitude(model: PreTrainedModel, counts: Counts) -> list[LayerMask]:
    """Mask the heads and columns with the smallest norm over all their weights."""
    family, masks = find_family(model.config), []
    shapes = layer_shapes(model.config)
    for layer, shape, count in zip(family.decoder_layers(model), shapes, counts, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        heads = per_head(attention.o_proj.weight.square().sum(0), shape)
        heads = heads + per_head(attention.q_proj.weight.square().sum(1), shape)
        columns = mlp.down_proj.weight.square().sum(0)
        columns = columns + mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
        masks.append(mask_lowest(shape, heads, columns, *count))
    zero_removed(model, family, masks)
    return masks


@torch.no_grad()
def prune_wanda_sp(
    model: PreTrainedModel, samples: Tensor, counts: Counts, settings: PruningSettings
) -> list[LayerMask]:
    """Mask the heads and columns with the lowest Wanda scores, layer by layer."""
    family, masks = find_family(model.config), []
    planned = zip(layer_shapes(model.config), counts, strict=True)

    def prune(layer: nn.Module, attention: ChannelStatistics, mlp: ChannelStatistics) -> None:
        shape, count = next(planned)
        heads = (layer.self_attn.o_proj.weight.abs().double() * attention.norm).mean(0)
        columns = (layer.mlp.down_proj.weight.abs().double() * mlp.norm).mean(0)
        masks.append(mask_lowest(shape, per_head(heads, shape), columns, *count))
        zero_layer(layer, family, masks[-1])

    run_with_statistics(model, samples, settings, prune)
    return masks


@torch.no_grad()
def prune_flap(model: PreTrainedModel, samples: Tensor, share: float, settings: PruningSettings) -> list[LayerMask]:
    """Mask about ``share`` of the block weights with the lowest standardised scores, and add FLAP's biases."""
    family, shapes = find_family(model.config), layer_shapes(model.config)
    layers, statistics, scores = family.decoder_layers(model), [], []

    def score(layer: nn.Module, attention: ChannelStatistics, mlp: ChannelStatistics) -> None:
        statistics.append((attention, mlp))
        channels = attention.variance * layer.self_attn.o_proj.weight.double().square().sum(0)
        columns = mlp.variance * layer.mlp.down_proj.weight.double().square().sum(0)
        shape = shapes[len(scores)]
        # The authors' code squares the attention metric, and standardises channels before averaging over a head.
        heads = per_head(standardised(channels.square()), shape) / shape.head_dim
        scores.append((heads, standardised(columns)))

    run_with_statistics(model, samples, settings, score)
    counts = global_counts(scores, shapes, layers, share)
    masks = []
    for layer, shape, (heads, columns), count, (attention, mlp) in zip(
        layers, shapes, scores, counts, statistics, strict=True
    ):
        mask = mask_lowest(shape, heads, columns, *count)
        removed = mask.removed_units()
        compensate_with_bias(layer.self_attn.o_proj, attention.mean, expand(removed[HEADS], shape.head_dim))
        compensate_with_bias(layer.mlp.down_proj, mlp.mean, expand(removed[COLUMNS], 1))
        zero_layer(layer, family, mask)
        masks.append(mask)
    return masks


def global_counts(
    scores: list[tuple[Tensor, Tensor]], shapes: list[LayerShape], layers: nn.ModuleList, share: float
) -> list[tuple[int, int]]:
    """Numbers of head units and columns per layer if the lowest scores of all layers are removed up to ``share``."""
    parts, costs = [], []
    for (heads, columns), shape, layer in zip(scores, shapes, layers, strict=True):
        units = unit_scores(heads, shape)
        parts += [units, columns]
        # A head unit has query rows and output columns and, in multi-head attention, key and value rows.
        maps = 2 * shape.num_kv_heads if shape.heads_per_group > 1 else 4
        hidden = layer.mlp.down_proj.out_features
        costs += [torch.full((len(units),), hidden * shape.head_dim * maps), torch.full((len(columns),), hidden * 3)]
    order = torch.cat(parts).argsort()
    shares = torch.cat(costs)[order].cumsum(0).double() / sum(layer_weights(layer) for layer in layers)
    removed = torch.zeros(len(order), dtype=torch.long)
    removed[order[: int((shares - share).abs().argmin()) + 1]] = 1
    counts = [int(part.sum()) for part in removed.split([len(part) for part in parts])]
    return list(zip(counts[::2], counts[1::2], strict=True))


def layer_weights(layer: nn.Module) -> int:
    """Number of weights in the attention and MLP matrices of a layer."""
    return sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))


def compensate_with_bias(linear: nn.Linear, mean: Tensor, removed: Tensor) -> None:
    """Add to the bias of ``linear`` the output for the ``mean`` of its ``removed`` inputs."""
    bias = (linear.weight[:, removed].double() @ mean[removed]).to(linear.weight.dtype)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)


def run_with_statistics(
    model: PreTrainedModel,
    samples: Tensor,
    settings: PruningSettings,
    process: Callable[[nn.Module, ChannelStatistics, ChannelStatistics], None],
) -> None:
    """Call ``process`` on every layer with the input statistics of ``o_proj`` and ``down_proj``, then run the layer."""
    family = find_family(model.config)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_kwargs(model, layers, samples, settings)
    for layer, call in zip(layers, calls, strict=True):
        forward = LayerForward(layer, family, hidden, call, settings)
        attention = input_statistics(layer.get_submodule(family.attention_out), forward.attention_inputs())
        forward.finish_attention()
        mlp = input_statistics(layer.get_submodule(family.mlp_out), forward.column_inputs())
        process(layer, attention, mlp)
        LayerForward(layer, family, hidden, call, settings).advance()


def input_statistics(linear: nn.Linear, batches: Iterable[Tensor]) -> ChannelStatistics:
    """Statistics of ``batches`` (…, in) of inputs of ``linear``."""
    statistics = ChannelStatistics(linear.in_features)
    for batch in batches:
        statistics.add(batch)
    return statistics


def per_head(channels: Tensor, shape: LayerShape) -> Tensor:
    """Sums (heads,) over the ``channels`` (heads · head_dim,) of each head."""
    return channels.view(shape.num_heads, shape.head_dim).sum(1)


def unit_scores(heads: Tensor, shape: LayerShape) -> Tensor:
    """Scores of head units: heads or, in grouped-query attention, the n-th lowest heads of all kv groups together."""
    if shape.heads_per_group == 1:
        return heads
    return heads.view(shape.num_kv_heads, -1).sort(dim=1).values.mean(0)


def mask_lowest(shape: LayerShape, heads: Tensor, columns: Tensor, units: int, num_columns: int) -> LayerMask:
    """Mask that removes the ``units`` lowest heads and the ``num_columns`` lowest columns.

    In grouped-query attention, ``units`` heads are removed per kv group. At least one head (per kv group) and one
    column are kept.
    """
    groups = shape.num_kv_heads if shape.heads_per_group > 1 else 1
    by_group = heads.view(groups, -1)
    units, num_columns = min(units, by_group.shape[1] - 1), min(num_columns, len(columns) - 1)
    offsets = torch.arange(groups)[:, None] * by_group.shape[1]
    kept_heads = (by_group.argsort(dim=1)[:, units:] + offsets).flatten().sort().values
    kept_columns = columns.argsort()[num_columns:].sort().values
    return LayerMask.from_heads(shape, kept_heads.tolist(), kept_columns.tolist())


def standardised(scores: Tensor) -> Tensor:
    """``scores`` with mean 0 and variance 1."""
    return (scores - scores.mean()) / scores.std()
