"""The layer-wise (sequential) pruner; the row of the family table names the maps that it prunes.

1. Run the embeddings on the calibration samples; capture the inputs of the first layer and the layer kwargs of all.
2. Onload the next decoder layer. Where a run is resumed and the layer is finished, restore it and go to 7.
3. Accumulate the Hessian of the attention's output map (``o_proj``) on the layer's inputs.
4. Prune whole heads of it and compensate; zero what feeds them.
5. Accumulate the Hessian of the FFN's output map (``down_proj``) on the outputs of the pruned attention.
6. Prune its columns and compensate; those of every expert in a mixture of experts, and of a shared expert. Log the
   layer and store it for ``--resume``. Where whole experts are the unit, remove those of a layer and refit the others
   instead; 3 to 5 remove no heads then.
7. Replace the inputs by the outputs of the pruned layer; offload the layer; go to 2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from slim_utils.common.loading import peak_memory_mib
from slim_utils.common.memory import empty_cache, full_gpu_as_out_of_memory
from slim_utils.families import Family, LayerShape, layer_shapes
from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.experts import Experts, result_of_experts
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs, check_finite
from slim_utils.layerwise.layer_kwargs import LayerKwargs
from slim_utils.layerwise.layer_maps import column_maps, head_maps
from slim_utils.layerwise.layer_report import ExpertRefit, LayerReport
from slim_utils.layerwise.less_memory import warn_of_full_memory
from slim_utils.layerwise.offload import CPU, ResidentModel
from slim_utils.layerwise.output_maps import OutputMaps
from slim_utils.layerwise.resume import LayerStore, changed_parameters, copied_parameters, put_back_parameters
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.layerwise.whole_experts import prune_whole_experts
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.params_remove import mask_experts, zero_heads
from slim_utils.routers import Router
from slim_utils.slimgpt import PruneResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Arguments: layer index, output maps, units of every group to prune.
PruneHook = Callable[[int, OutputMaps, int], None]


@dataclass(frozen=True)
class _PrunedLayer:
    """Mask of a pruned layer, results of its attention, FFN and shared expert, and of the removal of whole experts."""

    mask: LayerMask
    attention: PruneResult
    mlp: PruneResult
    experts: ExpertRefit | None = None
    shared: PruneResult | None = None


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel,
    family: Family,
    samples: Tensor,
    plans: Sequence[LayerPlan],
    settings: PruningSettings,
    store: LayerStore | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    host: ResidentModel | None = None,
    starts: Tensor | None = None,
    hook: PruneHook | None = None,
) -> tuple[list[LayerMask], list[LayerReport]]:
    """Prune ``model`` in place, layer by layer.

    Args:
        model: its weights are changed, its shapes are not.
        family: its row of the table.
        samples: (num_samples, seqlen) calibration token ids of this process.
        plans: heads and columns, or whole experts, to remove, by layer; a layer with an empty plan is unchanged.
        settings: how layers are pruned.
        store: finished layers, which are not pruned again; on the main process only.
        processes: process group; each process has its own samples.
        host: storage of the model (default: resident on the CPU).
        starts: (count, 8) sink windows of this process, for the first half of the layers.
        hook: called before heads or columns are pruned, but not before whole experts are.

    Returns:
        The mask of every layer, and a report of every pruned layer. Routers are masked where experts are removed.

    Raises:
        UserError: if activations are not finite, with the layer named.
    """
    shapes = layer_shapes(model.config)
    masks = [LayerMask.dense(shape) for shape in shapes]
    reports: list[LayerReport] = []
    pruned = [index for index, plan in enumerate(plans) if plan]
    if not pruned:
        return masks, reports
    host = host or ResidentModel(model, family)
    pruner = _SequentialPruner(
        host, [samples] if starts is None else [samples, starts], settings, processes, hook, store
    )
    done = pruner.load_activations(pruned)
    with logging_redirect_tqdm():
        for index in tqdm(range(pruned[-1] + 1), desc="layers", unit="layer", disable=processes.rank > 0 or None):
            start = time.perf_counter()
            layer = pruner.onload(index)
            report = _restored(index, layer, family, store, processes)
            forwards: list[LayerForward] = []
            if index in pruned and report is None:
                forwards, result = pruner.prune(index, layer, shapes[index], plans[index])
            if done < index < pruned[-1]:
                pruner.advance(index, layer, forwards)
            if index in pruned and report is None:
                seconds, peak = time.perf_counter() - start, peak_memory_mib(settings.device)
                batches = pruner.settings.batch_samples, str(pruner.settings.cache_dev)
                parts = result.mask, result.attention, result.mlp
                report = LayerReport(
                    index, *parts, seconds, peak, *batches, experts=result.experts, shared=result.shared
                )
                logger.info(report.log_line(len(shapes)))
                if store:
                    store.save(layer, family, report)
                    pruner.keep_activations(index, pruned[-1])
            if report is not None:
                masks[index] = report.mask
                reports.append(report)
            host.offload(index, masks[index])
    return masks, reports


class _SequentialPruner:
    """State of the pass: inputs of the next layer and kwargs of all layers; retries when out of device memory.

    There is one set of inputs per window length: the samples and, in the first half of the layers, the sink windows. In
    the second half attention sinks are established, and short windows would only bias the Hessians.
    """

    def __init__(
        self,
        host: ResidentModel,
        windows: list[Tensor],
        settings: PruningSettings,
        processes: ProcessGroup,
        hook: PruneHook | None,
        store: LayerStore | None,
    ) -> None:
        self.hook = hook
        self.host, self.family, self.windows, self.processes = host, host.family, windows, processes
        self.store = store
        # Of several processes, each would have to keep activations of its own; states that layers share are not kept.
        solo = processes.world_size == 1 and not any(shape.kv_sharing for shape in layer_shapes(host.model.config))
        self._solo_store = store if solo else None
        # Reduced by an earlier process of the run.
        self.settings = store.reduced(settings) if store else settings
        self.hidden: list[Tensor] = []
        self.calls: list[list[LayerKwargs]] = []
        self._attempt("the embeddings", self._begin, PruningSettings.with_host_cache)

    def load_activations(self, pruned: list[int]) -> int:
        """Load the activations that an earlier process stored; returns the index of their layer, −1 without any."""
        if self._solo_store and self._solo_store.has_all(pruned):
            # Nothing is left to prune.
            return pruned[-1]
        kept = self._solo_store and self._solo_store.kept_activations(pruned, self.settings.cache_dev)
        if not kept:
            return -1
        index, hidden = kept
        self.hidden[: len(hidden)] = hidden
        logger.info("--resume: going on after layer %d with its stored activations", index)
        return index

    def keep_activations(self, index: int, last: int) -> None:
        """Store the outputs of layer ``index`` for a resumed run."""
        if self._solo_store and index < last:
            needed = 1 if index + 1 >= len(self.host.layers) / 2 else len(self.hidden)
            self._solo_store.activations.save(index, self.hidden[:needed])

    def _begin(self) -> None:
        found = self._capture(self.windows, self.settings)
        self.hidden, self.calls = [hidden for hidden, _ in found], [calls for _, calls in found]

    def _capture(self, windows: list[Tensor], settings: PruningSettings) -> list[tuple[Tensor, list[LayerKwargs]]]:
        model, layers = self.host.model, self.host.layers
        with self.host.non_layer_modules():
            return [capture_layer_kwargs(model, layers, own, settings, self.processes) for own in windows]

    def onload(self, index: int) -> nn.Module:
        """Bring layer ``index`` to the device and return it."""
        if index >= len(self.host.layers) / 2:
            self.windows, self.hidden, self.calls = self.windows[:1], self.hidden[:1], self.calls[:1]
        device = self.settings.device
        release = partial(self.host.offload, index)
        return self._attempt(
            f"layer {index}", lambda: self.host.onload(index, device), PruningSettings.with_host_cache, release
        )

    def prune(
        self, index: int, layer: nn.Module, shape: LayerShape, plan: LayerPlan
    ) -> tuple[list[LayerForward], _PrunedLayer]:
        """Prune a layer; returns its forwards, ready to advance, its mask and results."""
        before = copied_parameters(layer, self.family)

        def work() -> tuple[list[LayerForward], _PrunedLayer]:
            forwards = [self._forward(index, layer, number) for number in range(len(self.windows))]
            return forwards, _prune_layer(index, forwards, shape, plan, self.processes, self.hook)

        def undo() -> None:
            put_back_parameters(layer, self.family, before)
            mask_experts(layer, self.family, LayerMask.dense(shape))

        return self._attempt(f"layer {index}", work, self._with_less_memory, undo)

    def advance(self, index: int, layer: nn.Module, forwards: list[LayerForward]) -> None:
        """Replace the inputs of a layer by its outputs; ``forwards`` are those of a pruned layer."""
        advanced = [0] * len(self.windows)

        def work() -> None:
            for number, done in enumerate(advanced):
                forward = forwards[number] if forwards else self._forward(index, layer, number, done)
                try:
                    forward.advance()
                finally:
                    # A retry skips finished batches.
                    advanced[number] = forward.advanced
                check_finite(forward.hidden, f"layer {index}", self.processes)

        # Their caches are freed before a retry.
        self._attempt(f"layer {index}", work, self._with_less_memory, forwards.clear)

    def _forward(self, index: int, layer: nn.Module, number: int, advanced: int = 0) -> LayerForward:
        """A layer with its inputs of one window length, of which the first ``advanced`` are outputs already."""
        calls = self.calls[number][index]
        if 0 < advanced < len(self.windows[number]):
            # The remaining samples may end in a batch of another size.
            [(_, again)] = self._capture([self.windows[number][advanced:]], replace(self.settings, cache_dev=CPU))
            calls = calls.with_batches_of(again[index])
        return LayerForward(layer, self.family, self.hidden[number], calls, self.settings, advanced)

    def _with_less_memory(self, settings: PruningSettings) -> PruningSettings | None:
        return settings.with_less_memory(self.windows[0])

    def _attempt(
        self,
        where: str,
        work: Callable[[], T],
        reduce: Callable[[PruningSettings], PruningSettings | None],
        undo: Callable[[], None] = lambda: None,
    ) -> T:
        """Run ``work``; when out of device memory, call ``undo`` and retry with reduced settings."""
        while True:
            try:
                with full_gpu_as_out_of_memory():
                    return work()
            except torch.OutOfMemoryError:
                reduced = reduce(self.settings)
                # A single process cannot restart a layer while the others wait in a collective.
                if reduced is None or self.processes.world_size > 1:
                    raise
            # Outside of the handler, whose traceback keeps the tensors of the failed work alive.
            undo()
            self.host.drop_prefetch()
            empty_cache(self.settings.device)
            warn_of_full_memory(where, reduced)
            self.settings = reduced
            if self.store:
                self.store.keep_reduced(reduced)
            if self.hidden:
                # Kwargs only, with captured activations on the host.
                found = self._capture(self.windows, replace(reduced, cache_dev=CPU))
                self.calls = [
                    [kwargs.with_batches_of(again) for kwargs, again in zip(calls, captured, strict=True)]
                    for calls, (_, captured) in zip(self.calls, found, strict=True)
                ]
                for first, *_ in self.calls:
                    first.move_shared(reduced.cache_dev)
                self.hidden = [hidden.to(reduced.cache_dev) for hidden in self.hidden]


def _restored(
    index: int, layer: nn.Module, family: Family, store: LayerStore | None, processes: ProcessGroup
) -> LayerReport | None:
    """Restore a stored layer in all processes; returns its report, ``None`` if it is not finished."""
    report = processes.on_main(lambda: store.restore(index, layer, family) if store else None)
    if report is not None:
        processes.on_main(lambda: None, [parameter.data for parameter in changed_parameters(layer, family).values()])
        mask_experts(layer, family, report.mask)
    return report


def _prune_layer(
    index: int,
    forwards: list[LayerForward],
    shape: LayerShape,
    plan: LayerPlan,
    processes: ProcessGroup,
    hook: PruneHook | None,
) -> _PrunedLayer:
    """Prune the heads of a layer, then its FFN columns or its experts on the outputs of the pruned attention."""
    settings, layer, family = forwards[0].settings, forwards[0].layer, forwards[0].family

    def prune(maps: OutputMaps, count: int) -> list[PruneResult]:
        if hook:
            hook(index, maps, count)
        results = processes.on_main(lambda: maps.prune(count, settings), maps.parameters)
        maps.release()
        return results

    keep: Callable[..., LayerMask] = LayerMask.from_groups
    if settings.by_query_head(shape):
        keep = LayerMask.from_heads
    # Of a layer without heads, or without an FFN.
    nothing = PruneResult([], [], error_uncompensated=0.0, error_compensated=0.0, percdamp=0.0)
    attention, mlp = nothing, nothing
    if shape.num_heads:
        maps = head_maps(index, forwards, shape, settings, processes)
        (attention,) = prune(maps, plan.heads // settings.heads_per_unit(shape))
        zero_heads(layer, family, keep(shape, attention.kept_units, list(range(shape.num_columns))))
        for forward in forwards:
            forward.finish_attention()
    refit = shared = None
    if plan.experts:
        experts, router = Experts.of(layer, family), Router.of(layer, family)
        samples = ((call, forward.hidden.shape[1]) for forward in forwards for call in forward.expert_calls())
        name = f"layer {index} {family.experts}"
        mlp, refit = prune_whole_experts(experts, router, name, samples, plan.experts, settings, processes)
    elif shape.num_columns:
        results = prune(column_maps(index, forwards, shape, processes), plan.columns)
        mlp = result_of_experts(results[: shape.num_experts]) if shape.num_experts else results[0]
        shared = results[-1] if shape.shared_per_column else None
    mask = keep(shape, attention.kept_units, mlp.kept_units, shared and shared.kept_units)
    return _PrunedLayer(mask, attention, mlp, refit, shared)
