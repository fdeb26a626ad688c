"""``run.json``: what was asked, on what, with which versions, and what came of it."""

from dataclasses import asdict
from typing import Any

from slim_utils.allocation.planner import Measured
from slim_utils.allocation.sensitivity import UnitSensitivity
from slim_utils.common.environment import command_line, environment
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.pruning_config import Effect, PruningConfig
from slim_utils.slim_dataset import CalibrationData
from slim_utils.slimgpt import PruneResult


def rounding_settings(config: PruningConfig) -> dict[str, Any]:
    """What the weights depend on by rounding alone: the size of batches, the versions of libraries, and the GPU."""
    found = environment(config.torch_device)
    versions = {name: found["versions"][name] for name in ("torch", "transformers")}
    return {**config.flags(Effect.ROUNDING), **versions, "GPU": found["hardware"]["device"]}


def calibration_record(data: CalibrationData) -> dict[str, Any]:
    """The fingerprint of the calibration samples."""
    num_samples, seqlen = data.samples.shape
    return {
        "source": data.source,
        "text_tokens": data.num_tokens,
        "sources": [asdict(source) for source in data.sources],
        "bos": data.bos,
        "num_samples": num_samples,
        "seqlen": seqlen,
        "samples_sha256": data.sha256,
    }


def pruning_record(
    config: PruningConfig,
    data: CalibrationData,
    provenance: dict[str, Any],
    reports: list[LayerReport],
    sizes: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``run.json`` of a pruning run, before the evaluation.

    Args:
        config: of the run.
        data: the calibration samples.
        provenance: of the model before this run.
        reports: a report a layer.
        sizes: of the model, and the share that was removed.
        seconds: of the pruning.
    """
    return {
        "command": command_line(),
        "arguments": config.to_json(),
        "seed": config.seed,
        **environment(config.torch_device),
        "calibration": calibration_record(data),
        "provenance": provenance,
        "sizes": sizes,
        "layers": [layer_record(report) for report in reports],
        "pruning_seconds": round(seconds, 2),
    }


def measured_record(measured: Measured) -> dict[str, Any]:
    """What was measured for the allocation, by the kind of measurement; nothing where nothing was."""
    kinds = {"search": measured.sensitivity, "refinement": measured.refinement}
    return {kind: _by_layer(found) for kind, found in kinds.items() if found}


def _by_layer(measured: dict[int, list[UnitSensitivity]]) -> list[dict[str, Any]]:
    """Units of heads and of columns, and their loss in nats, by layer."""
    return [
        {
            "layer": index,
            **{
                part: {"units_removed": of.count, "loss": of.loss}
                for part, of in zip(("attention", "mlp"), parts, strict=True)
            },
        }
        for index, parts in measured.items()
    ]


def layer_record(report: LayerReport) -> dict[str, Any]:
    """One layer: its plan, ratios, errors before and after compensation, damping used, seconds, memory."""
    heads, columns = report.mask.removed_share()
    return {
        "layer": report.layer,
        "plan": asdict(report.mask.plan),
        "attention": {"ratio": heads, **_errors(report.attention)},
        "mlp": {"ratio": columns, **_errors(report.mlp)},
        "seconds": round(report.seconds, 3),
        "peak_memory_mib": report.peak_memory_mib,
        "batch_samples": report.batch_samples,
        "cache_dev": report.cache_dev,
    }


def _errors(result: PruneResult) -> dict[str, float]:
    return {
        "error_before_compensation": result.error_uncompensated,
        "error_after_compensation": result.error_compensated,
        "percdamp": result.percdamp,
    }
