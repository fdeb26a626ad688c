"""Stages of a pruning run with ``--target_latency``: the latency table before, the measured latency afterwards."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slim_utils.allocation.latency_measurement import device_name, measure_latency_table, timed_model
from slim_utils.allocation.targets import saved_dtype
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_length
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_model
from slim_utils.common.memory import full_gpu_as_out_of_memory
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.resume import LayerStore
from slim_utils.profiling.latency import measure_latency
from slim_utils.profiling.latency_table import LatencyTable, PhaseSeconds, TimedRequest, read_latency_table
from slim_utils.pruning_config import DEFAULT_LATENCY_REPEATS, PruningConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def latency_table(config: PruningConfig, model_config: PreTrainedConfig) -> LatencyTable | None:
    """Return the latency table of the run: of ``--latency_file``, of the run that it resumes, or measured now.

    ``None`` without ``--target_latency``.

    Raises:
        UserError: if the table is of another model, dtype, unit of heads or batch.
    """
    if config.target_latency is None:
        return None
    dtype = saved_dtype(config, model_config) or torch.float32
    if config.latency_file:
        table = read_latency_table(config.latency_file)
        _check_table(table, config, model_config, dtype)
        return table
    stored = LayerStore(Path(config.save_dir)).latency if config.save_dir and config.resume else None
    if stored and stored.exists():
        return read_latency_table(stored)
    batch, prompt = config.request_size
    request = TimedRequest(batch, prompt)
    check_length(prompt + request.new_tokens, model_config, "--at_context, and the decoding steps,")
    logger.info("--target_latency without --latency_file: measuring a latency table, %s", request.text)
    return measure_latency_table(model_config, dtype, config.torch_device, request, config.gqa_unit)


def _check_table(
    table: LatencyTable, config: PruningConfig, model_config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    """Check that a table is of this run; one of another device is logged.

    Raises:
        UserError: if it is not, naming the flag to change.
    """
    flag, model, dtype_name = f"--latency_file {config.latency_file}", timed_model(model_config), str(dtype)[6:]
    again = "measure one with test_flops.py --latency_table"
    if table.model != model:
        other = table.model.text if table.model.text != model.text else f"{table.model.text}, other layer shapes"
        raise UserError(f"{flag}: of another model ({other}), not of {config.model_path} ({model.text}); {again}")
    if table.dtype != dtype_name:
        raise UserError(f"{flag}: measured in {table.dtype}, the run has {dtype_name}; add --dtype {table.dtype}")
    if table.gqa_unit != config.gqa_unit and any(shape.heads_per_group > 1 for shape in model.shapes):
        raise UserError(f"{flag}: measured by {table.gqa_unit}; add --gqa_unit {table.gqa_unit}")
    for name, measured in (("at_batch", table.request.batch_size), ("at_context", table.request.prompt_tokens)):
        if getattr(config, name) not in (None, measured):
            raise UserError(f"--{name} {getattr(config, name)}: {flag} was measured with {measured}; leave it out")
    device = device_name(config.torch_device)
    if table.device != device:
        logger.warning("%s: measured on %s, this is %s; the plan is for the former", flag, table.device, device)


def table_hash(table: LatencyTable) -> str:
    """Return the hash of a table's content, which the plan depends on."""
    return hashlib.sha256(json.dumps(table.to_json(), sort_keys=True).encode()).hexdigest()


def keep_table(store: LayerStore, table: LatencyTable | None) -> None:
    """Keep a table for ``--resume``: measured again, it would give another plan."""
    if table:
        write_json_atomic(store.latency, table.to_json())


def measured_latency(config: PruningConfig, host: ResidentModel, table: LatencyTable) -> dict[str, Any] | None:
    """Return the measured latency of the dense and of the saved pruned model, in turns, and log it.

    The masked model has the shapes of the dense one, and is timed in its place. ``None``, which is logged, where both
    are not on the device together.

    Args:
        config: flags of the run.
        host: the masked model.
        table: latency table of the run, whose batch is timed.
    """
    request, workload, device = table.request, config.latency_workload, config.torch_device
    compare = "test_flops.py --compare measures it"
    if config.stream:
        logger.warning("latency of the pruned model not measured with --stream; %s", compare)
        return None
    folder = str(Path(config.save_dir) / PRUNED_MODEL_FOLDER)
    pruned = load_model(folder, config.dtype, config.trust_remote_code, language_model=True)
    try:
        with full_gpu_as_out_of_memory():
            models = [host.model.to(device), pruned.to(device)]
            sizes = (request.batch_size, request.prompt_tokens, request.new_tokens)
            latencies = measure_latency(models, *sizes, DEFAULT_LATENCY_REPEATS)
    except torch.OutOfMemoryError:
        logger.warning("latency of the pruned model not measured: out of device memory with the dense one; %s", compare)
        return None
    seconds = [
        PhaseSeconds(latency.prefill_seconds, latency.decode_seconds).of(workload, request.new_tokens)
        for latency in latencies
    ]
    dense_ms, pruned_ms = (1e3 * value for value in seconds)
    message = "measured %s of %s: dense %.4g ms, pruned %.4g ms, %.4f of the model's"
    logger.info(message, workload, request.text, dense_ms, pruned_ms, pruned_ms / dense_ms)
    names = ("dense", "pruned")
    return {
        "seconds": dict(zip(names, seconds, strict=True)),
        "runs": {
            name: {"prefill": latency.prefill_runs, "decode": latency.decode_runs}
            for name, latency in zip(names, latencies, strict=True)
        },
    }
