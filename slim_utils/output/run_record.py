"""``run.json``: arguments, versions and data of a pruning run, and its results."""

from dataclasses import asdict, dataclass, field
from typing import Any

from slim_utils.allocation.planner import Sensitivities
from slim_utils.allocation.sensitivity import LayerSensitivity, UnitSensitivity
from slim_utils.common.environment import command_line, environment
from slim_utils.common.ngrams import NgramSample
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.pruning_config import Effect, PruningConfig
from slim_utils.slim_dataset import CalibrationData
from slim_utils.slimgpt import PruneResult


def rounding_settings(config: PruningConfig) -> dict[str, Any]:
    """Return the settings that change the weights by rounding errors only: batch sizes, library versions and GPU."""
    current = environment(config.torch_device)
    versions = {name: current["versions"][name] for name in ("torch", "transformers")}
    return {**config.flags(Effect.ROUNDING), **versions, "GPU": current["hardware"]["device"]}


@dataclass
class ModelSizes:
    """Sizes of the model before and after pruning.

    Attributes:
        parameters_dense: parameters of the model before the run.
        block_share_removed: fraction of its block weights that the run removes.
        parameters_pruned: parameters of the pruned model, if it is saved.
        block_share_removed_in_total: fraction of the block weights of the dense base removed by all runs, if saved.
    """

    parameters_dense: int
    block_share_removed: float
    parameters_pruned: int | None = None
    block_share_removed_in_total: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the known sizes by name."""
        return {name: size for name, size in asdict(self).items() if size is not None}


@dataclass
class RunRecord:
    """The content of ``run.json``; what is not measured is left out.

    Attributes:
        command: command line of the run.
        arguments: flags by name.
        seed: seed of the calibration samples.
        environment: versions, commit and hardware.
        calibration: fingerprint of the calibration samples.
        provenance: dense base of the model and the steps since; ``{}`` for a run that saves nothing.
        sizes: sizes of the model.
        layers: reports of the pruned layers.
        pruning_seconds: seconds of the measurements and the pruning.
        sensitivities: sensitivities that the plans were allocated by.
        target: dense, requested and achieved size of ``--target_macs`` or ``--target_memory``.
        latency: requested, predicted and measured seconds of ``--target_latency``, with the latency table.
        perplexity: a row per text and window length, of the pruned model.
        peak_memory_mib: peak memory of the process, by host and GPU.
    """

    command: str
    arguments: dict[str, Any]
    seed: int
    environment: dict[str, Any]
    calibration: dict[str, Any]
    provenance: dict[str, Any]
    sizes: ModelSizes
    layers: list[LayerReport]
    pruning_seconds: float
    sensitivities: Sensitivities = field(default_factory=Sensitivities)
    target: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    perplexity: list[dict[str, Any]] | None = None
    peak_memory_mib: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record by the keys of ``run.json``, in order."""
        measured = {
            "search": _sensitivity_rows(self.sensitivities.dense),
            "refinement": _sensitivity_rows(self.sensitivities.refined),
            "target": self.target,
            "latency": self.latency,
            "perplexity": self.perplexity,
            "peak_memory_mib": self.peak_memory_mib,
        }
        return {
            "command": self.command,
            "arguments": self.arguments,
            "seed": self.seed,
            **self.environment,
            "calibration": self.calibration,
            "provenance": self.provenance,
            "sizes": self.sizes.to_json(),
            "layers": [layer_record(report) for report in self.layers],
            "pruning_seconds": round(self.pruning_seconds, 2),
            **{key: value for key, value in measured.items() if value},
        }


def pruning_record(
    config: PruningConfig,
    data: CalibrationData,
    provenance: dict[str, Any],
    sizes: ModelSizes,
    reports: list[LayerReport],
    seconds: float,
    sensitivities: Sensitivities,
) -> RunRecord:
    """Return the record of a pruning run before its evaluation.

    Args:
        config: flags of the run.
        data: calibration samples.
        provenance: provenance of the model before this run.
        sizes: sizes of the model.
        reports: reports of the pruned layers.
        seconds: seconds of the measurements and the pruning.
        sensitivities: sensitivities that the plans were allocated by.
    """
    return RunRecord(
        command=command_line(),
        arguments=config.to_json(),
        seed=config.seed,
        environment=environment(config.torch_device),
        calibration=calibration_record(data),
        provenance=provenance,
        sizes=sizes,
        layers=reports,
        pruning_seconds=seconds,
        sensitivities=sensitivities,
    )


def calibration_record(data: CalibrationData) -> dict[str, Any]:
    """Return the fingerprints of the calibration samples: their hash, and a sample of their n-grams."""
    num_samples, seqlen = data.samples.shape
    return {
        "source": data.source,
        "text_tokens": data.num_tokens,
        "sources": [asdict(source) for source in data.sources],
        "bos": data.bos,
        "num_samples": num_samples,
        "seqlen": seqlen,
        "samples_sha256": data.sha256,
        "ngrams": NgramSample.of_windows([data.samples]).text,
    }


def layer_record(report: LayerReport) -> dict[str, Any]:
    """Return the row of one layer: plan, ratios, errors before and after compensation, damping, seconds, memory."""
    heads, columns = report.mask.removed_share()
    shared = 1 - len(report.mask.kept_shared) / (report.mask.shape.num_shared_columns or 1)
    return {
        "layer": report.layer,
        "plan": asdict(report.mask.plan),
        "attention": {"ratio": heads, **_errors(report.attention)},
        "mlp": {"ratio": columns, **_errors(report.mlp)},
        **({"experts": asdict(report.experts)} if report.experts else {}),
        **({"shared_expert": {"ratio": shared, **_errors(report.shared)}} if report.shared else {}),
        "seconds": round(report.seconds, 3),
        "peak_memory_mib": report.peak_memory_mib,
        "batch_samples": report.batch_samples,
        "cache_dev": report.cache_dev,
    }


def _errors(result: PruneResult) -> dict[str, Any]:
    return {
        "error_before_compensation": result.error_uncompensated,
        "error_after_compensation": result.error_compensated,
        "percdamp": result.percdamp,
        "solve_dtype": result.solve_dtype,
        "solve_device": result.solve_device,
    }


def _sensitivity_rows(sensitivities: dict[int, LayerSensitivity]) -> list[dict[str, Any]]:
    """Return a row per layer: reference count and loss in nats per token, of heads and of columns."""
    return [
        {"layer": index, "attention": _reference_loss(layer.heads), "mlp": _reference_loss(layer.columns)}
        for index, layer in sensitivities.items()
    ]


def _reference_loss(sensitivity: UnitSensitivity) -> dict[str, Any]:
    return {"units_removed": sensitivity.count, "loss": sensitivity.loss}
