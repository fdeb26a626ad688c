"""Checks of a checkpoint before it is used, with one-line errors."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from models.wrappers import OTHER_PARTS
from slim_utils.common.errors import UserError, is_disk_full
from slim_utils.common.gguf_header import is_gguf
from slim_utils.common.weight_files import unpickling_reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Prefixes of torch.compile, which may also wrap submodules, and of DistributedDataParallel.
_WRAPPER_PREFIXES = {r"^(?:_orig_mod\.|module\.)+": "", r"\._orig_mod\.": "."}
# Buffers that the library recomputes: frequencies, positions, causal masks.
_BUFFERS = r"\.(inv_freq|masked_bias|position_ids)$|(^|\.)h\.\d+\.attn\.(bias|causal_mask)$"
# Unused tensors that may accompany a model: multi-token prediction, a value head, buffers.
_HARMLESS = re.compile(rf"(^|\.)(mtp|v_head)\.|{_BUFFERS}")
# Last parts of the names of embeddings and head.
_TIED = ("lm_head.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight")
# Of PreTrainedModel: drops names of extra weights that the class knows.
_ADJUST_KEYS = "_adjust_missing_and_unexpected_keys"
_MAX_NAMES = 4


@contextmanager
def loading(model_path: str) -> Iterator[None]:
    """Turn errors of loading the checkpoint ``model_path``, a folder or hub name, into a one-line :class:`UserError`.

    Raises:
        UserError: if the checkpoint is missing, damaged, not a model, or needs missing code or packages.
    """
    folder = Path(model_path)
    if model_path.startswith((".", "/", "~")) and not folder.is_dir() and not is_gguf(model_path):
        raise UserError(f"model {model_path}: no such folder")
    with _one_line_errors(f"model {model_path}: cannot be loaded", folder):
        yield


@contextmanager
def building(config: PreTrainedConfig) -> Iterator[None]:
    """Turn errors of building a model from ``config`` into a one-line :class:`UserError`.

    Raises:
        UserError: if the installed transformers cannot build the model.
    """
    name = config.name_or_path or f"of type '{config.model_type}'"
    with _one_line_errors(f"model {name}: cannot be built from its configuration"):
        yield


@contextmanager
def _one_line_errors(message: str, folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Configurations, tokenizers, unpicklers, quantisers and remote code raise many exception classes.
        if is_disk_full(error):
            raise
        pointers = _lfs_pointers(folder) if folder else []
        if pointers:
            reason = f"{', '.join(pointers[:_MAX_NAMES])}: a Git LFS pointer, not the file; run git lfs pull there"
        else:
            reason = _first_sentence(error)
        raise UserError(f"{message}: {reason}") from error


def _first_sentence(error: Exception) -> str:
    """First line of the error message, plus the lines that a trailing colon announces; the class for a bare message."""
    if isinstance(error, pickle.UnpicklingError):
        return f"a weight file {unpickling_reason(error)}"
    # The library's lookups raise the missing key alone, its checks a sentence.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    sentence = " " in message
    message = message if sentence else str(error)
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    text = " ".join(lines[:end])
    if isinstance(error, KeyError) and not sentence:
        # Usually a lookup in a table of transformers: rotary embeddings, activations.
        return f"KeyError: {text} (unknown to transformers {transformers.__version__}, or missing)"
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _lfs_pointers(folder: Path) -> list[str]:
    """Files of a checkpoint folder that are Git LFS pointers; weight files only in the format that would be loaded."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    pointers = [path.name for path in files if _is_lfs_pointer(path)]
    if any(path.suffix == ".safetensors" and path.name not in pointers for path in files):
        return [name for name in pointers if not name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack"))]
    return pointers


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def check_unquantised(config: PreTrainedConfig, model_path: str) -> None:
    """Check that the weights are not quantised.

    Raises:
        UserError: if the configuration has the settings of a quantiser.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            method = settings.get("quant_method") or ("bitsandbytes" if bits else "unknown method")
            base = _base_by_card(model_path)
            raise UserError(
                f"model {model_path}: its weights are quantised ({method}); use the unquantised checkpoint"
                f"{f', {base} by its card' if base else ''}, and quantise the pruned model afterwards"
            )


def _base_by_card(model_path: str) -> str:
    """The base that the model card in the folder ``model_path`` names; empty without one."""
    try:
        base = ModelCard.load(Path(model_path) / "README.md").data.base_model
    except Exception:
        # No card, or one without metadata; it is a mere hint.
        return ""
    return str(base[0] if isinstance(base, list) else base or "")


@cache
def log_narrowed(model_path: str, dtypes: tuple[str, ...], loaded: torch.dtype) -> None:
    """Log, once per model, that weights stored in several dtypes are loaded in one that is narrower than some.

    Args:
        model_path: checkpoint folder.
        dtypes: dtypes of the stored weights.
        loaded: dtype of the model.
    """
    wider = [name for name in dtypes if torch.finfo(getattr(torch, name)).bits > torch.finfo(loaded).bits]
    if wider and len(dtypes) > 1:
        logger.info(
            "model %s: weights in %s are loaded in %s, as transformers does; --dtype %s of model_slimming.py keeps all",
            model_path,
            " and ".join(dtypes),
            str(loaded).removeprefix("torch."),
            wider[0],
        )


def untie_stored_head(config: PreTrainedConfig, model_path: str) -> None:
    """Clear ``tie_word_embeddings`` if the safetensors files in ``model_path`` store an untied head.

    transformers loads the untied head too, but keeps the flag, and so loses the head when the model is saved and
    reloaded.
    """
    if getattr(config, "tie_word_embeddings", False) and _stores_untied_head(Path(model_path)):
        config.tie_word_embeddings = False
        log_untied_head(model_path)


@cache
def log_untied_head(model_path: str) -> None:
    """Log, once per model, that ``tie_word_embeddings`` is cleared because the checkpoint stores an untied head."""
    logger.info(
        "model %s: tie_word_embeddings is set, but the checkpoint has an untied head; the flag is cleared", model_path
    )


def _stores_untied_head(folder: Path) -> bool:
    """Whether embeddings and head are both stored, with different values; ``False`` for damaged files."""
    try:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            files = {SAFE_WEIGHTS_NAME}
        elif (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            files = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            files = {file for name, file in files.items() if name.endswith(_TIED)}
        else:
            return False
        matrices = {}
        for file in files:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    if name.endswith(_TIED):
                        matrices[name] = tensors.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    if len(matrices) != 2:
        return False
    first, second = matrices.values()
    return first.shape != second.shape or not torch.equal(first, second.to(first.dtype))


def check_weights(
    model_path: str, config: PreTrainedConfig, names: dict[str, str] | None = None, **options: Any
) -> dict[str, str]:
    """Compare names and shapes of the stored weights with those of the model, before any weight is read.

    Args:
        model_path: checkpoint folder or hub name.
        config: configuration of the model.
        names: ``key_mapping`` for ``from_pretrained``, for the language model of a multimodal checkpoint.
        options: further arguments of ``from_pretrained``.

    Returns:
        ``key_mapping`` for ``from_pretrained``: ``names``, and the prefixes of wrappers if the weights match without
        them.

    Raises:
        UserError: naming weights that are missing, have another shape, or are not part of the model.
    """
    harmless = _HARMLESS if not names else re.compile(f"{_HARMLESS.pattern}|{OTHER_PARTS}")
    difference, extra = _compare(model_path, config, harmless, key_mapping=names or None, **options)
    renamings = names or {}
    # Only if weights are missing: for a tensor stored under both names, the choice would be arbitrary.
    if "missing" in difference:
        without_prefixes = {**_WRAPPER_PREFIXES, **renamings}
        stripped, stripped_extra = _compare(model_path, config, harmless, key_mapping=without_prefixes, **options)
        if not stripped:
            difference, extra, renamings = {}, stripped_extra, without_prefixes
            logger.info("model %s: its weights have the names of a wrapped model; the prefix is stripped", model_path)
    if difference:
        details = "; ".join(f"{kind}: {names}" for kind, names in difference.items())
        raise UserError(f"model {model_path}: the weights do not match config.json; {details}")
    extra = [name for name in extra if not re.match(OTHER_PARTS, name)]
    if extra:
        logger.info("model %s: ignoring weights outside the language model: %s", model_path, _names(extra))
    return renamings


def _compare(
    model_path: str, config: PreTrainedConfig, harmless: re.Pattern[str], **options: Any
) -> tuple[dict[str, str], list[str]]:
    """Names of stored weights that do not match the model, by kind of mismatch, and names of ignored extra weights.

    Args:
        model_path: checkpoint folder or hub name.
        config: configuration of the model.
        harmless: pattern of the extra weights that are ignored.
        options: arguments of ``from_pretrained``.
    """
    with capture_load_report() as report, _no_progress(), _recorded_unexpected() as unexpected:
        try:
            # On the meta device, only headers are read, and experts are merged without their values.
            _, info = AutoModelForCausalLM.from_pretrained(
                model_path,
                config=config,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except RuntimeError:
            # Experts that cannot be merged appear only in the library's report.
            incomplete = report.names("CONVERSION")
            if not incomplete:
                raise
            return {"incomplete": _names(incomplete)}, []
    extra = {name for name in info["unexpected_keys"] if harmless.search(name)}
    # The classes of the library leave out in silence what they know and do not use, such as multi-token prediction.
    known = {name for name in unexpected - info["unexpected_keys"] if not re.search(_BUFFERS, name)}
    shapes = {f"{name} ({list(stored)}, not {list(expected)})" for name, stored, expected in info["mismatched_keys"]}
    kinds = {
        "missing": info["missing_keys"],
        "wrong shape": shapes,
        "not part of the model": info["unexpected_keys"] - extra,
    }
    return {kind: _names(names) for kind, names in kinds.items() if names}, sorted(extra | known)


@contextmanager
def _recorded_unexpected() -> Iterator[set[str]]:
    """Context in which names of stored weights that a model does not have are added to the set, also known ones.

    The library tells of known ones by no public way. In a version without the private method, none are added.
    """
    # Takes seconds, which a mere check of flags does without.
    from transformers import PreTrainedModel

    unexpected: set[str] = set()
    adjust = getattr(PreTrainedModel, _ADJUST_KEYS, None)
    if adjust is None:
        yield unexpected
        return

    def record(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        for info in (*args, *options.values()):
            unexpected.update(getattr(info, "unexpected_keys", ()))
        return adjust(model, *args, **options)

    setattr(PreTrainedModel, _ADJUST_KEYS, record)
    try:
        yield unexpected
    finally:
        setattr(PreTrainedModel, _ADJUST_KEYS, adjust)


def _names(names: set[str] | list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


class _LoadReport(logging.Filter):
    """Logging filter that captures the library's load report, which a one-line error replaces."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Capture the load report; pass all other records."""
        if "LOAD REPORT" not in str(record.msg):
            return True
        self._text += record.getMessage()
        return False

    def names(self, status: str) -> list[str]:
        """Names of the weights with ``status`` in the report."""
        return re.findall(rf"^(\S+) +\| (?:\x1b\[\w+)?{status}", self._text, flags=re.MULTILINE)


@contextmanager
def capture_load_report() -> Iterator[_LoadReport]:
    """Capture the library's load report instead of logging it."""
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
