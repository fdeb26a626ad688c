"""What a checkpoint has to be before anything is done with it, and what is said where it is not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from slim_utils.common.errors import UserError, is_disk_full

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

FUSED_FOLDER = "lora_fused_model"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Of torch.compile, which may wrap parts of a model too, and of DistributedDataParallel.
_WRAPPER_PREFIXES = {r"^(?:_orig_mod\.|module\.)+": "", r"\._orig_mod\.": "."}
# Beside a whole model, and no part of what it computes: prediction of further tokens, a value head, buffers that the
# library makes anew. What else the library leaves out by itself, it does not report.
_HARMLESS = re.compile(r"(^|\.)(mtp|v_head)\.|\.(inv_freq|masked_bias|position_ids)$")
_NAMED = 4


@contextmanager
def loading(model_path: str) -> Iterator[None]:
    """Turn whatever is raised about the checkpoint ``model_path``, a folder or hub name, into one line.

    Raises:
        UserError: if it is missing, damaged, not a model, or needs code or packages that are not there.
    """
    folder = Path(model_path)
    if model_path.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"model {model_path}: no such folder")
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        fused = folder / FUSED_FOLDER
        advice = f"give {fused}" if fused.is_dir() else "fuse the adapters into their base first and give the result"
        raise UserError(f"model {model_path}: a folder of adapters ({ADAPTER_CONFIG_NAME}), not a model; {advice}")
    with _one_line(f"model {model_path}: cannot be loaded", folder):
        yield


@contextmanager
def building(config: PreTrainedConfig) -> Iterator[None]:
    """Turn whatever is raised while a model is made from ``config`` into one line.

    Raises:
        UserError: if the installed library cannot make it.
    """
    name = config.name_or_path or f"of type '{config.model_type}'"
    with _one_line(f"model {name}: cannot be built from its configuration"):
        yield


@contextmanager
def _one_line(message: str, folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Configurations, tokenizers, unpicklers, quantisers and remote code raise classes of all kinds.
        if is_disk_full(error):
            raise
        pointers = _lfs_pointers(folder) if folder else []
        if pointers:
            reason = f"{', '.join(pointers[:_NAMED])}: a Git LFS pointer, not the file itself; run git lfs pull there"
        else:
            reason = _first_sentence(error)
        raise UserError(f"{message}: {reason}") from error


def _first_sentence(error: Exception) -> str:
    """The first line of its message, with those after it that a colon promises; its class where that is all it says."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    text = " ".join(lines[:end])
    if isinstance(error, KeyError):
        # Of a table of the library, most often: rotary embeddings, activations.
        return f"KeyError: {text} (unknown to transformers {transformers.__version__}, or missing)"
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _lfs_pointers(folder: Path) -> list[str]:
    """Files of a checkpoint that were never downloaded; of weights, those in the format that would be used."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    pointers = [path.name for path in files if _starts_as_pointer(path)]
    if any(path.suffix == ".safetensors" and path.name not in pointers for path in files):
        return [name for name in pointers if not name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack"))]
    return pointers


def _starts_as_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def check_unquantised(config: PreTrainedConfig, model_path: str) -> None:
    """Make sure that weights are what they are multiplied by.

    Raises:
        UserError: if they are stored with scales, in the format of a quantiser.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            method = settings.get("quant_method") or "unknown method"
            advice = "give the unquantised checkpoint"
            raise UserError(f"model {model_path}: its weights are quantised ({method}); {advice}")


def untie_own_head(config: PreTrainedConfig, model_path: str) -> None:
    """Correct ``tie_word_embeddings`` where the safetensors files in ``model_path`` hold a head of its own.

    The library would keep the two apart as well, but leave the configuration as it is, and lose the head when it is
    saved and read again.
    """
    if getattr(config, "tie_word_embeddings", False) and _has_own_head(Path(model_path)):
        config.tie_word_embeddings = False
        log_own_head(model_path)


@cache
def log_own_head(model_path: str) -> None:
    """Say, once, that the head of ``model_path`` is kept apart from its embeddings."""
    logger.info(
        "model %s: tie_word_embeddings is set, but a head of its own is stored; it is kept, and the flag is cleared",
        model_path,
    )


def _has_own_head(folder: Path) -> bool:
    """Whether both matrices are stored, with different values; damaged files are for the loading to complain about."""
    try:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            files = {SAFE_WEIGHTS_NAME}
        elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            files = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            files = {file for name, file in files.items() if name.endswith(("lm_head.weight", "embed_tokens.weight"))}
        else:
            return False
        matrices = {}
        for file in files:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                        matrices[name] = tensors.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    if len(matrices) != 2:
        return False
    first, second = matrices.values()
    return first.shape != second.shape or not torch.equal(first, second.to(first.dtype))


def check_weights(model_path: str, config: PreTrainedConfig, **options: Any) -> dict[str, str]:
    """Hold the names and shapes of the stored weights against those of the model, before any weight is read.

    Args:
        model_path: checkpoint folder or hub name.
        config: its configuration.
        options: of the library's ``from_pretrained``.

    Returns:
        Renamings for the library's ``key_mapping``: of the prefixes that wrappers of a model leave, where all fits
        without them; else none.

    Raises:
        UserError: naming weights that are missing, of another shape, or no part of the model.
    """
    difference, extra = _compare(model_path, config, **options)
    renamings = {}
    # Only where something is missing: of a tensor stored under both names it would be chance which one counts.
    if "missing" in difference:
        stripped, extra_then = _compare(model_path, config, **options, key_mapping=_WRAPPER_PREFIXES)
        if not stripped:
            difference, extra, renamings = {}, extra_then, _WRAPPER_PREFIXES
            logger.info("model %s: its weights have the names of a wrapped model; the prefix is dropped", model_path)
    if difference:
        details = "; ".join(f"{kind}: {names}" for kind, names in difference.items())
        raise UserError(f"model {model_path}: the weights are not those of config.json; {details}")
    if extra:
        logger.info("model %s: left out, no part of the language model: %s", model_path, _names(extra))
    return renamings


def _compare(model_path: str, config: PreTrainedConfig, **options: Any) -> tuple[dict[str, str], list[str]]:
    """How the stored weights differ from the model's, with names by kind, and names of those that are only too many."""
    with load_report() as report, _no_progress():
        try:
            # On the meta device only headers are read, and experts are put together without their values.
            _, info = AutoModelForCausalLM.from_pretrained(
                model_path,
                config=config,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except RuntimeError:
            # Of experts that cannot be put together the library speaks in its report alone.
            broken = report.names("CONVERSION")
            if not broken:
                raise
            return {"incomplete": _names(broken)}, []
    extra = {name for name in info["unexpected_keys"] if _HARMLESS.search(name)}
    shapes = {f"{name} ({list(stored)}, not {list(wanted)})" for name, stored, wanted in info["mismatched_keys"]}
    kinds = {
        "missing": info["missing_keys"],
        "of another shape": shapes,
        "no part of the model": info["unexpected_keys"] - extra,
    }
    return {kind: _names(names) for kind, names in kinds.items() if names}, sorted(extra)


def _names(names: set[str] | list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class _LoadReport(logging.Filter):
    """Keeps the library's table of weights that do not fit from the log, for one line to take its place."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the table, and let the rest through."""
        if "LOAD REPORT" not in str(record.msg):
            return True
        self._text += record.getMessage()
        return False

    def names(self, status: str) -> list[str]:
        """Weights of that status."""
        return re.findall(rf"^(\S+) +\| (?:\x1b\[\w+)?{status}", self._text, flags=re.MULTILINE)


@contextmanager
def load_report() -> Iterator[_LoadReport]:
    """While the library's table of weights that do not fit is kept from the log."""
    report, library = _LoadReport(), logging.getLogger("transformers.modeling_utils")
    library.addFilter(report)
    try:
        yield report
    finally:
        library.removeFilter(report)


@contextmanager
def _no_progress() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
