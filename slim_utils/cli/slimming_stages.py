"""Stages of a pruning run: open the model, plan, prune."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slim_utils.allocation.planner import Planner, Sensitivities, no_cache, pruning_settings
from slim_utils.common.atomic_output import scratch_folder
from slim_utils.common.loading import is_multimodal_checkpoint, load_model, model_on_meta
from slim_utils.families import find_family
from slim_utils.layerwise.device_defaults import (
    CPU_TOKENS_PER_FORWARD,
    model_tokens_per_forward,
    resolve_solve_dtype,
)
from slim_utils.layerwise.distributed import ProcessGroup
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.layerwise.offload import OffloadedModel, ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.resume import LayerStore
from slim_utils.masks import LayerMask, LayerPlan
from slim_utils.output.multimodal import MultimodalOutput
from slim_utils.output.writers import Checkpoints, CheckpointWriter, StreamedOutput, WholeOutput
from slim_utils.profiling.latency_table import LatencyTable
from slim_utils.pruning_config import PruningConfig
from slim_utils.slim_dataset import CalibrationData, sink_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """Plan of every layer.

    Attributes:
        layers: the plans.
        size_masks: masks of the planned sizes; which units they keep is arbitrary.
        sensitivities: sensitivities that the plans were allocated by.
        latency: requested and predicted seconds of ``--target_latency``.
    """

    layers: list[LayerPlan]
    size_masks: list[LayerMask]
    sensitivities: Sensitivities = field(default_factory=Sensitivities)
    latency: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrunedModel:
    """Result of the pruning, whose weights are in the model.

    Attributes:
        masks: kept units of every layer.
        reports: reports of the pruned layers.
        plan: what was removed.
        output: writer of the checkpoints.
        seconds: seconds of measurements and pruning, over all processes of a resumed run.
    """

    masks: list[LayerMask]
    reports: list[LayerReport]
    plan: ModelPlan
    output: CheckpointWriter
    seconds: float


def open_host(config: PruningConfig, model_path: str) -> ResidentModel:
    """Return the model of ``model_path``, resident in memory or, with ``--stream``, offloaded to disk."""
    if config.stream:
        scratch = scratch_folder(Path(config.save_dir))
        return OffloadedModel(model_path, config.dtype, config.trust_remote_code, scratch, language_model=True)
    model = load_model(model_path, config.dtype, config.trust_remote_code, language_model=True)
    return ResidentModel(model, find_family(model.config))


def open_output(
    config: PruningConfig, host: ResidentModel, store: LayerStore | None, size_masks: list[LayerMask]
) -> CheckpointWriter:
    """Return the checkpoint writer: at the end or, with ``--stream`` in the main process, layer by layer."""
    # Without its experts alone, a stock model stays one.
    stock = host.model.config.model_type == host.family.base_type
    checkpoints = Checkpoints(
        masked=not config.whole_experts,
        pruned=config.save_pruned_weights,
        stock=config.uniform_shapes or (config.whole_experts and stock),
    )
    if isinstance(host, OffloadedModel) and store:
        return StreamedOutput(store.output, host, size_masks, checkpoints)
    if is_multimodal_checkpoint(config.model_path) and not config.text_only:
        source = config.model_path, config.dtype, config.trust_remote_code
        return MultimodalOutput(host.model, host.family, size_masks, checkpoints, *source)
    return WholeOutput(host.model, host.family, checkpoints)


def plan_without_weights(
    config: PruningConfig, model_config: PreTrainedConfig, table: LatencyTable | None = None
) -> ModelPlan | None:
    """Return the plan made on the meta device, or ``None``, with the target checked, if it is measured on the weights.

    Args:
        config: flags.
        model_config: configuration of the model.
        table: latency table, for ``--target_latency``.

    Raises:
        UserError: if the plan is impossible for the model, naming the flag to change.
    """
    model = model_on_meta(model_config, trust_remote_code=config.trust_remote_code)
    planner = Planner(config, ResidentModel(model, find_family(model_config)), table)
    if config.measures:
        planner.check_measurable()
        return None
    plans = planner.plans()
    return ModelPlan(plans, planner.size_masks(plans), latency=planner.latency(plans))


def with_device_defaults(config: PruningConfig, host: ResidentModel, num_tokens: int) -> PruningConfig:
    """Return ``config`` with the solver's dtype and the tokens per forward that suit the device.

    Args:
        config: flags.
        host: the model.
        num_tokens: calibration tokens of this process.
    """
    device = config.torch_device
    solve_dtype = str(resolve_solve_dtype(config.solve_dtype, device)).removeprefix("torch.")
    config = replace(config, solve_dtype=solve_dtype)
    if config.tokens_per_forward is not None:
        return config
    tokens = model_tokens_per_forward(host.model, device, config.torch_cache_dev, num_tokens)
    if tokens != CPU_TOKENS_PER_FORWARD:
        logger.info("%d tokens per forward (--tokens_per_forward)", tokens)
    return replace(config, tokens_per_forward=tokens)


def measured_plan(
    config: PruningConfig,
    host: ResidentModel,
    samples: Tensor,
    windows: Tensor | None,
    store: LayerStore | None,
    table: LatencyTable | None = None,
) -> ModelPlan:
    """Return the plan measured on the weights of the dense model, which are unchanged on return."""
    planner = Planner(config, host, table)
    plans, sensitivities = planner.measured_plans(samples, windows, store.measured if store else no_cache)
    return ModelPlan(plans, planner.size_masks(plans), sensitivities, planner.latency(plans))


def prune(
    config: PruningConfig,
    data: CalibrationData,
    plan: ModelPlan | None,
    host: ResidentModel,
    store: LayerStore | None,
    processes: ProcessGroup,
    table: LatencyTable | None = None,
) -> PrunedModel:
    """Prune the model in place, each process on its shard of the calibration samples.

    Args:
        config: flags, with the preset and the defaults of the device resolved.
        data: calibration samples of all processes.
        plan: plan of every layer; ``None`` to measure it.
        host: the dense model.
        store: store of finished layers, if any.
        processes: processes that prune the same model.
        table: latency table, for a measured plan.
    """
    start = time.perf_counter()
    samples, windows = processes.shard(data.samples), None
    if config.sink_windows:
        windows = processes.shard(sink_windows(data.samples[:, data.bos :], config.sink_windows), "--sink_windows")
    plan = plan or measured_plan(config, host, samples, windows, store, table)
    output = open_output(config, host, store, plan.size_masks)
    settings = pruning_settings(config)
    masks, reports = prune_layers(
        host.model, host.family, samples, plan.layers, settings, store, processes, host, windows
    )
    if store:
        # No longer needed, and the output may need the disk space.
        store.activations.remove()
    seconds = time.perf_counter() - start + (store.seconds_before if store else 0)
    return PrunedModel(masks, reports, plan, output, seconds)
