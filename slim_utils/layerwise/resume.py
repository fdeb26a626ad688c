"""Finished layers of an unfinished run, on disk, so that a killed run resumes after them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slim_utils.common.atomic_output import save_tensors_atomic, write_json_atomic
from slim_utils.common.errors import UserError, error_reason
from slim_utils.common.output_folder import clear_leftovers, hidden_path
from slim_utils.families import Family
from slim_utils.layerwise.activations import ActivationStore
from slim_utils.layerwise.layer_report import LayerReport
from slim_utils.layerwise.settings import PruningSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE, REDUCED_FILE, ACTIVATIONS_FILE = "settings.json", "reduced.json", "activations.safetensors"
# In the file of settings, what is not compared, or not strictly.
NOTED, SECONDS = "noted", "seconds"
SAMPLED_VALUES = 64
CHECKSUM = "sha256"


class LayerStore:
    """A folder beside the output of a run: its settings, and a file for every finished layer (written atomically).

    A layer's file holds the parameters that pruning changed, and the layer's report.

    Args:
        save_dir: the output folder of the run.
        keep_activations: GiB that the activations after the last finished layer may take; 0 keeps none, ``None`` what
            the disk has room for.
    """

    def __init__(self, save_dir: Path, keep_activations: float | None = None) -> None:
        self.folder = hidden_path(save_dir, "unfinished")
        self.activations = ActivationStore(self.folder / ACTIVATIONS_FILE, keep_activations)
        # Checkpoints that are written layer by layer.
        self.output = self.folder / "output"
        self._target = save_dir
        # Seconds of the earlier processes, each from its start to its last finished layer or measurement.
        self.seconds_before = 0.0

    def measured(self, refinement: int = 0) -> Path:
        """File of the measurements of the sensitivity analysis (0) or of a round of refinement."""
        return self.folder / f"measured_{refinement}.json"

    @property
    def latency(self) -> Path:
        """File of the latency table that the plan was made by."""
        return self.folder / "latency.json"

    def exists(self) -> bool:
        """Whether there is an unfinished run."""
        return self.folder.exists()

    def open(self, settings: dict[str, Any], resume: bool, noted: dict[str, Any] | None = None) -> None:
        """Begin a run, or resume one with the same settings.

        Args:
            settings: everything that the weights depend on.
            resume: whether to resume.
            noted: settings that may change, with a warning: weights then agree up to rounding.

        Raises:
            UserError: if the unfinished run has other settings, with the differences.
        """
        noted = noted or {}
        path = self.folder / SETTINGS_FILE
        if not resume or not path.exists():
            if resume:
                logger.info("--resume: no unfinished run; starting anew")
            self.discard()
            clear_leftovers(self._target)
            self.folder.mkdir()
        else:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier, seconds = before.pop(NOTED, {}), before.pop(SECONDS, 0.0)
            if changes := setting_changes(before, settings):
                difference = "; ".join(changes)
                raise UserError(
                    f"--resume: not the same run: {difference}; to start anew pass --overwrite, without --resume"
                )
            if changes := setting_changes(earlier, noted):
                message = "--resume: %s; weights agree with those of one run up to rounding"
                logger.warning(message, "; ".join(changes))
            # The settings were written when the earlier process began; later files show how long it ran.
            last = max(file.stat().st_mtime for file in self.folder.rglob("*") if file.is_file())
            self.seconds_before = seconds + last - path.stat().st_mtime
            clear_leftovers(self._target)
        write_json_atomic(path, {**settings, NOTED: noted, SECONDS: self.seconds_before})

    def reduced(self, settings: PruningSettings) -> PruningSettings:
        """``settings``, reduced to those that :meth:`keep_reduced` stored."""
        path = self.folder / REDUCED_FILE
        if not path.exists():
            return settings
        kept = json.loads(path.read_text(encoding="utf-8"))
        cache_dev = torch.device("cpu") if kept["cache_dev"] == "cpu" else settings.cache_dev
        return replace(settings, batch_samples=min(kept["batch_samples"], settings.batch_samples), cache_dev=cache_dev)

    def keep_reduced(self, settings: PruningSettings) -> None:
        """Store settings that fit in the device's memory; a resumed run begins with them."""
        content = {"batch_samples": settings.batch_samples, "cache_dev": str(settings.cache_dev)}
        write_json_atomic(self.folder / REDUCED_FILE, content)

    def discard(self) -> None:
        """Remove the folder, layers first: a partial folder keeps the settings that identify its layers."""
        for path in self.folder.glob("layer_*"):
            path.unlink()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def save(self, layer: nn.Module, family: Family, report: LayerReport) -> None:
        """Store a finished layer."""
        parameters = changed_parameters(layer, family)
        metadata = {"report": report.to_json(), CHECKSUM: checksum(parameters)}
        save_tensors_atomic(parameters, self._path(report.layer), metadata)

    def restore(self, index: int, layer: nn.Module, family: Family) -> LayerReport | None:
        """Put a finished layer's parameters in place; its report, or ``None`` where it is not finished.

        Raises:
            UserError: if the layer's file is damaged, or of another version of the suite.
        """
        if not self._path(index).exists():
            return None
        parameters = changed_parameters(layer, family)
        try:
            with safe_open(self._path(index), "pt") as file:
                metadata = file.metadata()
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except SafetensorError as error:
            raise self._damaged(index) from error
        # Earlier versions stored none.
        if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(stored):
            raise self._damaged(index)
        try:
            report = LayerReport.from_json(metadata["report"])
            targets = {name: parameters[name] for name in stored}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--resume: {self._path(index)} is of another version of the suite ({error_reason(error)}); "
                "to start anew pass --overwrite, without --resume"
            ) from error
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(stored[name])
        return report

    def kept_activations(self, pruned: list[int], device: torch.device) -> tuple[int, list[Tensor]] | None:
        """Index of a layer and its outputs, from where the run goes on; ``None`` where it has to begin at the first.

        Args:
            pruned: indices of the layers that the run prunes; up to the kept activations all have to be finished.
            device: to load the activations to.
        """
        return self.activations.load(device, lambda last: self.has_all(index for index in pruned if index <= last))

    def has_all(self, layers: Iterable[int]) -> bool:
        """Whether all of ``layers`` are finished."""
        return all(self._path(index).exists() for index in layers)

    def _damaged(self, index: int) -> UserError:
        path = self._path(index)
        return UserError(f"--resume: {path} is damaged; remove it and the later layers to prune them again")

    def _path(self, index: int) -> Path:
        return self.folder / f"layer_{index:04}.safetensors"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, shapes, dtypes and content of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(content.shape)} {content.dtype}".encode())
        digest.update(content.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def changed_parameters(layer: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """Parameters of a layer that pruning changes, by name."""
    if family.head_norms:
        return dict(layer.named_parameters())
    maps = (family.attention_out, family.mlp_out, family.shared_map)
    names = (*(f"{name}.weight" for name in maps), f"{family.experts}.down_proj")
    return {name: parameter for name, parameter in layer.named_parameters() if name in names}


def copied_parameters(layer: nn.Module, family: Family) -> dict[str, Tensor]:
    """Copies of :func:`changed_parameters`, on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in changed_parameters(layer, family).items()}


def put_back_parameters(layer: nn.Module, family: Family, copies: dict[str, Tensor]) -> None:
    """Restore the parameters of a layer from :func:`copied_parameters`."""
    for name, parameter in changed_parameters(layer, family).items():
        parameter.copy_(copies[name])


def setting_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between the settings of a run and those of the run that resumes it, as text."""
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def fingerprint(config: PreTrainedConfig, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a model's configuration and of a sample of values of each parameter."""
    digest = hashlib.sha256(config.to_json_string().encode())
    for name, parameter in parameters:
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED_VALUES)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()
