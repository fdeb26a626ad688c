"""Provenance of a model (``slimgpt.json``): its dense base, and all pruning and recovery steps since.

A run reads the file of its input model, appends its own step, and writes the file beside its output weights. Likewise
``pruning.json``, which has the units of the base that are left.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download

from models.wrappers import TEXT_OF_KEY
from slim_utils.common.adapters import adapter_base, base_checkpoint
from slim_utils.common.atomic_output import write_json_atomic
from slim_utils.common.errors import UserError, error_reason
from slim_utils.common.loading import model_on_meta
from slim_utils.common.model_source import input_format
from slim_utils.common.ngrams import NgramSample
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import PRUNING_FILE, LayerMask, ModelUnits, read_units
from slim_utils.output.hub import HUB_ERRORS
from slim_utils.profiling.model_stats import count_parameters, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROVENANCE_FILE = "slimgpt.json"
FORMAT_VERSION = 1
PRUNING, RECOVERY, INPUT = "pruning", "recovery", "input"
# Keys of the base and of a step by its kind, and values of what a file may leave out.
_BASE_KEYS = {"name", "parameters", "block_weights", "layers"}
_BASE_DEFAULTS: dict[str, Any] = {"on_hub": False, "card": {}}
_STEP_KEYS = {PRUNING: {"block_weights"}, RECOVERY: set(), INPUT: set()}
_STEP_DEFAULTS: dict[str, Any] = {"settings": {}, "datasets": []}
CARD_FILE = "README.md"
CARRIED_KEYS = ("license", "license_name", "license_link", "language")

logger = logging.getLogger(__name__)


def read_provenance(model_path: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """Provenance of a model, from its file; without a file, the model is its own base and has no steps.

    Args:
        model_path: folder or hub name.
        config: configuration of the model.
        trust_remote_code: run model code found in the checkpoint.

    Returns:
        ``base``: ``name``, ``on_hub``, ``card`` (licence and language), ``parameters``, ``block_weights``, ``layers``
        (heads, kv heads and FFN width of each), ``experts`` (number in each), ``shared_columns`` (width of the shared
        expert of each) and, for the language model of a multimodal model, ``text_of`` (type of the latter); ``steps``:
        see :func:`pruning_step`, :func:`recovery_step` and :func:`input_step`.
    """
    note, base = input_format(model_path), adapter_base(model_path)
    if note:
        provenance = read_provenance(base, config, trust_remote_code) if base else _dense_base(model_path, config)
        return with_step(provenance, input_step([("model", public_name(model_path)), ("format", note)]))
    try:
        text = _checkpoint_file(model_path, PROVENANCE_FILE).read_text(encoding="utf-8")
    except Exception as error:
        # Errors of the file system or the hub; most models have no such file.
        logger.info("no %s of %s (%s)", PROVENANCE_FILE, model_path, type(error).__name__)
        return _dense_base(model_path, config, trust_remote_code)
    try:
        return _complete(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error_reason(error)
        logger.warning("%s of %s: unknown format (%s); its history is dropped", PROVENANCE_FILE, model_path, reason)
    return _dense_base(model_path, config, trust_remote_code)


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` of a file, with what another version may have left out.

    Raises:
        KeyError: if what cannot be left out is missing.
        ValueError: for another format.
        TypeError, AttributeError: for content of other types.
    """
    if content["format"] != FORMAT_VERSION:
        raise ValueError(f"format {content['format']}, not {FORMAT_VERSION}")
    base = _BASE_DEFAULTS | content["base"]
    steps = [_STEP_DEFAULTS | step for step in content["steps"]]
    for entry, keys in ((base, _BASE_KEYS), *((step, _STEP_KEYS[step["kind"]]) for step in steps)):
        if missing := sorted(keys - entry.keys()):
            raise KeyError(missing[0])
    return content | {"base": base, "steps": steps}


def _dense_base(model_path: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """Provenance of a model that is its own base."""
    family, shapes = find_family(config), layer_shapes(config)
    model = model_on_meta(config, trust_remote_code=trust_remote_code)
    dense = [LayerMask.dense(shape) for shape in shapes]
    base = {
        "name": public_name(model_path),
        "on_hub": not Path(model_path).exists(),
        "card": base_card_data(model_path),
        "parameters": count_parameters(model),
        "block_weights": sum(
            weights_of(layer, family, mask)[1] for layer, mask in zip(family.decoder_layers(model), dense, strict=True)
        ),
        "layers": [[shape.num_heads, shape.num_kv_heads, shape.ffn_width] for shape in shapes],
        "experts": [shape.num_experts for shape in shapes],
        "shared_columns": [shape.num_shared_columns for shape in shapes],
    }
    if hasattr(config, TEXT_OF_KEY):
        base["text_of"] = getattr(config, TEXT_OF_KEY)
    return {"format": FORMAT_VERSION, "base": base, "steps": []}


def read_model_units(model_path: str, config: PreTrainedConfig, provenance: dict[str, Any]) -> ModelUnits:
    """Units of a model as indices into those of its dense base, from its ``pruning.json`` if it was pruned before.

    Without such a file, they are indices into the model's own units; a warning says so.

    Args:
        model_path: folder or hub name.
        config: configuration of the model.
        provenance: its provenance.
    """
    name, shapes = public_name(model_path), layer_shapes(config)
    if not pruning_steps(provenance):
        return ModelUnits.unpruned(provenance["base"]["name"], config.model_type, True, shapes)
    try:
        units = read_units(_checkpoint_file(model_path, PRUNING_FILE), shapes)
    except (UserError, *HUB_ERRORS) as error:
        logger.info("no units in %s of %s (%s)", PRUNING_FILE, model_path, error_reason(error))
        units = ModelUnits.unpruned(name, config.model_type, False, shapes)
    if not units.is_dense:
        logger.warning(
            "%s was pruned before without a record of the units that it kept of %s: %s will have indices into the "
            "units of %s",
            name,
            provenance["base"]["name"],
            PRUNING_FILE,
            units.model,
        )
    return units


def public_name(path: str) -> str:
    """Name of a model or text that is safe to publish: a hub name, or the last part of a path."""
    return Path(path).resolve().name if Path(path).exists() else path


def pruning_step(
    settings: list[tuple[str, Any]], block_weights: int, datasets: Sequence[str] = (), ngrams: str = ""
) -> dict[str, Any]:
    """A step that removes weights.

    Args:
        settings: names and values for the model card.
        block_weights: number of remaining block weights.
        datasets: hub names of the calibration texts.
        ngrams: :attr:`NgramSample.text` of the calibration samples, which later training data should not overlap with.
    """
    step = {"kind": PRUNING, "settings": dict(settings), "block_weights": block_weights, "datasets": list(datasets)}
    return step | ({"calibration_ngrams": ngrams} if ngrams else {})


def recovery_step(settings: list[tuple[str, Any]], datasets: Sequence[str] = ()) -> dict[str, Any]:
    """A step that trains; arguments as for :func:`pruning_step`."""
    return {"kind": RECOVERY, "settings": dict(settings), "datasets": list(datasets)}


def input_step(settings: list[tuple[str, Any]]) -> dict[str, Any]:
    """A step that makes a model of an adapter or a GGUF file; arguments as for :func:`pruning_step`."""
    return {"kind": INPUT, "settings": dict(settings), "datasets": []}


def with_step(provenance: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """``provenance`` with ``step`` appended."""
    return provenance | {"steps": [*provenance["steps"], step]}


def pruning_steps(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The pruning steps of ``provenance``."""
    return [step for step in provenance["steps"] if step["kind"] == PRUNING]


def calibration_ngrams(provenance: dict[str, Any]) -> NgramSample:
    """A sample of the n-grams of all calibration samples that the pruning steps used, as far as they are recorded."""
    sample = NgramSample.of_windows([])
    for step in pruning_steps(provenance):
        if "calibration_ngrams" not in step:
            continue
        try:
            sample |= NgramSample.from_text(step["calibration_ngrams"])
        except (TypeError, ValueError) as error:
            reason = error_reason(error)
            logger.warning("%s: calibration_ngrams cannot be read (%s); left out", PROVENANCE_FILE, reason)
    return sample


def total_share_removed(provenance: dict[str, Any]) -> float:
    """Share of the base's block weights that all pruning steps together removed."""
    steps = pruning_steps(provenance)
    return 1 - steps[-1]["block_weights"] / provenance["base"]["block_weights"] if steps else 0.0


def remaining_weights(layers: Any, family: Any, masks: list[LayerMask]) -> int:
    """Block weights that ``masks`` keep of decoder ``layers`` in their shapes before removal."""
    sizes = [weights_of(layer, family, mask) for layer, mask in zip(layers, masks, strict=True)]
    return sum(total - removed for removed, total in sizes)


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write ``provenance`` beside the weights in ``folder``."""
    write_json_atomic(folder / PROVENANCE_FILE, provenance)


def base_card_data(model_path: str) -> dict[str, Any]:
    """Licence and language from the card of the base model, in its folder or on the hub; empty without a card."""
    try:
        data = ModelCard.load(_checkpoint_file(model_path, CARD_FILE)).data.to_dict()
    except Exception as error:
        logger.info("no model card of %s (%s)", model_path, type(error).__name__)
        return {}
    return {key: data[key] for key in CARRIED_KEYS if key in data}


def copy_license_files(model_path: str, folder: Path) -> None:
    """Copy the licence and notice files in the folder of the base model to ``folder``."""
    for path in sorted(Path(base_checkpoint(model_path)).glob("*")):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(path, folder / path.name)


def _checkpoint_file(model_path: str, name: str) -> Path:
    """Path of a file of a checkpoint, for an adapter of its base, in its folder or downloaded from the hub."""
    model_path = base_checkpoint(model_path)
    return Path(model_path) / name if Path(model_path).exists() else Path(hf_hub_download(model_path, name))
