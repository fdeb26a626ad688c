"""``run.json``: what was asked, on what, with which versions, and what came of it."""

import argparse
from dataclasses import asdict
from typing import Any

from slim_utils.allocation.sensitivity import Sublayer
from slim_utils.common.environment import command_line, environment
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.slim_dataset import CalibrationData
from slim_utils.slimgpt import PruneResult


def rounding_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the weights depend on by rounding alone: the size of batches, the versions of libraries, and the GPU."""
    found = environment(args.device)
    versions = {name: found["versions"][name] for name in ("torch", "transformers")}
    return {"--batch_samples": args.batch_samples, **versions, "GPU": found["hardware"]["device"]}


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
    args: argparse.Namespace,
    data: CalibrationData,
    provenance: dict[str, Any],
    reports: list[LayerReport],
    sizes: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``run.json`` of a pruning run, before the evaluation.

    Args:
        args: of the command line.
        data: the calibration samples.
        provenance: of the model before this run.
        reports: a report a layer.
        sizes: of the model, and the share that was removed.
        seconds: of the pruning.
    """
    arguments = {
        name: value if isinstance(value, (int, float, list, type(None))) else str(value)
        for name, value in vars(args).items()
    }
    return {
        "command": command_line(),
        "arguments": arguments,
        "seed": args.seed,
        **environment(args.device),
        "calibration": calibration_record(data),
        "provenance": provenance,
        "sizes": sizes,
        "layers": [layer_record(report) for report in reports],
        "pruning_seconds": round(seconds, 2),
    }


def search_record(measured: dict[int, list[Sublayer]]) -> list[dict[str, Any]]:
    """What a search, or a refinement, has measured, by layer: units of heads and of columns, and their loss in nats."""
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
    """One layer: ratio asked and got, errors before and after compensation, damping used, seconds, memory."""
    heads, columns = report.mask.removed_share()
    return {
        "layer": report.layer,
        "ratio_asked": report.ratio.heads if len(set(report.ratio)) == 1 else list(report.ratio),
        "attention": {"ratio": heads, **_errors(report.attention)},
        "mlp": {"ratio": columns, **_errors(report.mlp)},
        "seconds": round(report.seconds, 3),
        "peak_memory_mib": report.peak_memory_mib,
        "batch_samples": report.batch_samples,
        "cache_dev": report.cache_dev,
    }


def _errors(result: PruneResult) -> dict[str, float]:
    fields = asdict(result)
    return {
        "error_before_compensation": fields["error_zeroed"],
        "error_after_compensation": fields["error"],
        "percdamp": fields["percdamp"],
    }
