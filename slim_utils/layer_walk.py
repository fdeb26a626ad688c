"""The layer walk: one decoder layer after another, each on the outputs of the pruned ones before it.

The walk knows no family: it asks the table's row for the names of two linear maps.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from slim_utils.experts import prune_experts
from slim_utils.families import Family, LayerShape, layer_shapes
from slim_utils.layer_host import LayerHost
from slim_utils.layer_replay import LayerCalls, LayerReplay, capture_layer_calls, check_finite
from slim_utils.layer_report import LayerReport
from slim_utils.layer_store import LayerStore, changed_parameters
from slim_utils.model_io import peak_memory_mib
from slim_utils.params_remove import settle_heads
from slim_utils.pruning_record import LayerMask
from slim_utils.slimgpt import PruneResult, SlimGPT, units_to_remove
from slim_utils.sparsity_schedule import LayerRatio
from slim_utils.walk_settings import WalkSettings
from slim_utils.world import ALONE, World

logger = logging.getLogger(__name__)

# Layer, name of the map, what has its Hessian, and the ratio, columns of a unit and groups that it is pruned with.
Onlooker = Callable[[int, str, SlimGPT, float, int, int], None]


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel,
    family: Family,
    samples: Tensor,
    ratios: Sequence[float | LayerRatio],
    settings: WalkSettings,
    store: LayerStore | None = None,
    world: World = ALONE,
    host: LayerHost | None = None,
    starts: Tensor | None = None,
    onlooker: Onlooker | None = None,
) -> tuple[list[LayerMask], list[LayerReport]]:
    """Prune ``model`` in place, layer by layer.

    Args:
        model: its weights are changed, its shapes are not.
        family: its row of the table.
        samples: (num_samples, seqlen) calibration token ids, of this process.
        ratios: pruning ratio of every layer; 0 leaves a layer alone.
        settings: how.
        store: where finished layers are kept; those that are there already are not pruned again. In the first process
            alone.
        world: the processes that prune the same model, each on its own samples.
        host: where the model's layers are (default: on the CPU).
        starts: (count, few) token ids besides, of this process: beginnings of text, for the first half of the layers.
        onlooker: called before a map of heads or of columns, but not of experts, is pruned.

    Returns:
        The mask of every layer of the model, and a report of every pruned one.

    Raises:
        UserError: if activations are not finite, with the layer named.
    """
    shapes = layer_shapes(model.config)
    masks = [LayerMask.dense(shape) for shape in shapes]
    reports: list[LayerReport] = []
    ratios = [LayerRatio.of(ratio) for ratio in ratios]
    pruned = [index for index, ratio in enumerate(ratios) if any(ratio)]
    if not pruned:
        return masks, reports
    aligned = settings.aligned(shapes, ratios)
    host = host or LayerHost(model, family)
    walk = _Walk(host, [samples] if starts is None else [samples, starts], settings, world, onlooker)
    with logging_redirect_tqdm():
        for index in tqdm(range(pruned[-1] + 1), desc="layers", unit="layer", disable=world.rank > 0 or None):
            start = time.perf_counter()
            layer = host.fetch(index, settings.device)
            report = _restored(index, layer, family, store, world)
            if index in pruned and report is None:
                replays, (mask, attention, mlp) = walk.prune(index, layer, shapes[index], aligned[index])
            else:
                replays = walk.replays(index, layer)
            if index < pruned[-1]:
                for replay in replays:
                    replay.advance()
                    check_finite(replay.hidden, f"layer {index}", world)
            if index in pruned and report is None:
                seconds, peak = time.perf_counter() - start, peak_memory_mib(settings.device)
                report = LayerReport(index, ratios[index], mask, attention, mlp, seconds, peak)
                logger.info(report.log_line(len(shapes)))
                if store:
                    store.save(layer, family, report)
            if report is not None:
                masks[index] = report.mask
                reports.append(report)
            host.release(index, masks[index])
    return masks, reports


def planned_masks(
    shapes: list[LayerShape], ratios: Sequence[float | LayerRatio], settings: WalkSettings
) -> list[LayerMask]:
    """Masks of the sizes that pruning will give; which units they keep is not known before."""
    masks, asked = [], [LayerRatio.of(ratio) for ratio in ratios]
    for shape, (head_ratio, column_ratio) in zip(shapes, settings.aligned(shapes, asked), strict=True):
        width = shape.ffn_width - units_to_remove(shape.ffn_width, column_ratio)
        columns = [ffn * shape.ffn_width + i for ffn in range(shape.num_ffns) for i in range(width)]
        groups, size = shape.num_kv_heads, shape.heads_per_group
        if settings.by_query_head(shape):
            kept = size - units_to_remove(shape.num_heads, head_ratio, groups) // groups
            heads = [group * size + i for group in range(groups) for i in range(kept)]
            masks.append(LayerMask.from_heads(shape, heads, columns))
        else:
            masks.append(
                LayerMask.from_groups(shape, list(range(groups - units_to_remove(groups, head_ratio))), columns)
            )
    return masks


class _Walk:
    """Where the walk is: the inputs of the next layer, and how all layers are called; with less memory if need be.

    Windows of each length have their own: the samples and, in the first half of the layers, beginnings of text. Later
    the part that a first token plays is settled, and layers would only be fitted to contexts shorter than those in use.
    """

    def __init__(
        self,
        host: LayerHost,
        windows: list[Tensor],
        settings: WalkSettings,
        world: World,
        onlooker: Onlooker | None,
    ) -> None:
        self.onlooker = onlooker
        self.host, self.family, self.windows, self.world = host, host.family, windows, world
        self.settings = settings
        self.hidden, self.calls = self._capture()

    def _capture(self) -> tuple[list[Tensor], list[list[LayerCalls]]]:
        model, layers = self.host.model, self.host.layers
        with self.host.outside():
            found = [capture_layer_calls(model, layers, own, self.settings, self.world) for own in self.windows]
        return [hidden for hidden, _ in found], [calls for _, calls in found]

    def replays(self, index: int, layer: nn.Module) -> list[LayerReplay]:
        """The next layer on its inputs, a replay for each length of windows."""
        if index >= len(self.host.layers) / 2:
            self.windows, self.hidden, self.calls = self.windows[:1], self.hidden[:1], self.calls[:1]
        return [
            LayerReplay(layer, self.family, hidden, send_to_device(calls[index], self.settings.device), self.settings)
            for hidden, calls in zip(self.hidden, self.calls, strict=True)
        ]

    def prune(
        self, index: int, layer: nn.Module, shape: LayerShape, aligned: LayerRatio
    ) -> tuple[list[LayerReplay], tuple[LayerMask, PruneResult, PruneResult]]:
        """Prune the next layer; where the device's memory does not do, once more with smaller batches."""
        before = {name: value.to("cpu", copy=True) for name, value in changed_parameters(layer, self.family).items()}
        while True:
            replays = self.replays(index, layer)
            try:
                return replays, _prune_layer(index, replays, shape, aligned, self.world, self.onlooker)
            except torch.OutOfMemoryError:
                relieved = self.settings.relieved(self.windows[0])
                # One process cannot leave the others waiting in the middle of a layer.
                if relieved is None or self.world.size > 1:
                    raise
            # Out of the handler, which holds on to all that the layer had in memory.
            del replays
            self.host.give_way()
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()
            message = "layer %d: the device's memory is full; going on with %d samples at once, activations on %s"
            logger.warning(message, index, relieved.batch_samples, relieved.cache_dev)
            self.settings = relieved
            _, self.calls = self._capture()
            self.hidden = [hidden.to(relieved.cache_dev) for hidden in self.hidden]
            for name, parameter in changed_parameters(layer, self.family).items():
                parameter.copy_(before[name])


def _restored(
    index: int, layer: nn.Module, family: Family, store: LayerStore | None, world: World
) -> LayerReport | None:
    """The report of a layer that the store holds, whose parameters all processes then have."""
    report = world.once(lambda: store.restore(index, layer, family) if store else None)
    if report is not None:
        world.once(lambda: None, [parameter.data for parameter in changed_parameters(layer, family).values()])
    return report


def head_unit(shape: LayerShape, settings: WalkSettings) -> tuple[int, int, Callable[..., LayerMask]]:
    """Columns of a unit of heads, groups of units that lose equally many, and what makes a mask of kept units."""
    if settings.by_query_head(shape):
        return shape.head_dim, shape.num_kv_heads, LayerMask.from_heads
    return shape.head_dim * shape.heads_per_group, 1, LayerMask.from_groups


def _prune_layer(
    index: int,
    replays: list[LayerReplay],
    shape: LayerShape,
    aligned: LayerRatio,
    world: World,
    onlooker: Onlooker | None,
) -> tuple[LayerMask, PruneResult, PruneResult]:
    """Prune the heads of a layer, then, on what its pruned attention puts out, its FFN columns."""
    settings, layer, family = replays[0].settings, replays[0].layer, replays[0].family

    def seen(inputs: Callable[[LayerReplay], Iterator[Any]]) -> Iterator[Any]:
        return chain.from_iterable(map(inputs, replays))

    def prune(name: str, inputs: Iterator[Tensor], ratio: float, unit_size: int, num_groups: int = 1) -> PruneResult:
        linear = layer.get_submodule(name)
        pruner = SlimGPT(linear, f"layer {index} {name}")
        for batch in inputs:
            pruner.add_batch(batch)
        pruner.add_up(world.sum)
        if onlooker:
            onlooker(index, name, pruner, ratio, unit_size, num_groups)
        result = world.once(
            lambda: pruner.struct_prune(
                ratio, unit_size, settings.percdamp, settings.compensate, num_groups, settings.choices
            ),
            [linear.weight.data],
        )
        pruner.free()
        return result

    unit_size, num_groups, keep = head_unit(shape, settings)
    attention = prune(family.attention_out, seen(LayerReplay.attention_inputs), aligned.heads, unit_size, num_groups)
    settle_heads(layer, family, keep(shape, attention.kept_units, list(range(shape.num_columns))))
    for replay in replays:
        replay.finish_attention()
    if shape.num_experts:
        experts, name = layer.get_submodule(family.experts), f"layer {index} {family.experts}"
        calls = seen(LayerReplay.expert_calls)
        mlp = prune_experts(experts, name, calls, aligned.columns, settings, world)
    else:
        mlp = prune(family.mlp_out, seen(LayerReplay.column_inputs), aligned.columns, 1)
    return keep(shape, attention.kept_units, mlp.kept_units), attention, mlp
