"""Loading and saving models, and choosing devices."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file

import models  # noqa: F401 - registers the classes of pruned checkpoints
from models.families import FAMILIES
from models.like import LIKE_KEY, add_row_of
from models.wrappers import LANGUAGE_MODEL_NAMES, WRAPPER_TYPES, experts_as_stored, language_model_config
from slim_utils.common.adapters import BASE_KEY, base_checkpoint, fuse_adapters, merged_models
from slim_utils.common.checkpoint_checks import (
    building,
    capture_load_report,
    check_unquantised,
    check_weights,
    loading,
    log_narrowed,
    log_untied_head,
    untie_stored_head,
)
from slim_utils.common.errors import UserError
from slim_utils.common.gguf_config import complete_config
from slim_utils.common.gguf_input import (
    check_architecture,
    check_type_of_gguf,
    check_weights_of_gguf,
    complete_tokenizer,
    gguf_arguments,
    load_gguf,
)
from slim_utils.common.input_checks import check_padding_id
from slim_utils.common.model_source import check_files, check_undivided, input_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

try:
    import resource
except ImportError:
    # Not available on Windows.
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PRUNED_MODEL_FOLDER = "pruned_weights"
SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", SENTENCEPIECE_FILE)
# Of processors saved by older versions, which tokenizers do not read.
PROCESSOR_TEMPLATE_FILE = "chat_template.json"


def choose_device(name: str, flag: str = "--device") -> torch.device:
    """The device ``name``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: if the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{flag} {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{flag} {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{flag} {name}: this machine has {torch.cuda.device_count()} CUDA devices; use {flag} cpu")
    return device


def local_processes() -> int:
    """Number of processes of this run on this machine, as set by torchrun or accelerate launch; 1 without them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_local_device(name: str) -> torch.device:
    """The device ``name`` of ``--device`` for this process: ``auto`` and ``cuda`` are the GPU of its local rank.

    Raises:
        UserError: if the device does not exist, or a machine has fewer GPUs than processes.
    """
    processes = local_processes()
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if processes > devices:
            raise UserError(
                f"--device {name}: {processes} processes on a machine with {devices} CUDA devices; start one for each"
            )
        # Of a batch system, a process may see no GPU but its own, whatever its rank.
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % devices}"
    elif name.startswith("cuda:") and processes > 1:
        logger.warning("--device %s: all processes use this GPU; leave it out for one GPU each", name)
    return choose_device(name)


def load_config(model_path: str, trust_remote_code: bool, language_model: bool = False) -> PreTrainedConfig:
    """Configuration of a checkpoint (folder or hub name), without its weights.

    Args:
        model_path: checkpoint folder or hub name.
        trust_remote_code: run model code found in the checkpoint.
        language_model: of a multimodal model, return the configuration of its language model.

    Raises:
        UserError: if the configuration cannot be read or is inconsistent, the weights are quantised, or the model is
            multimodal without ``language_model``.
    """
    base = base_checkpoint(model_path)
    if base != model_path:
        with _naming_adapter(model_path):
            return load_config(base, trust_remote_code, language_model)
    folder, arguments = gguf_arguments(model_path)
    with loading(model_path):
        if arguments:
            check_architecture(model_path)
        else:
            add_row_of(PreTrainedConfig.get_config_dict(folder)[0])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **arguments)
        if arguments:
            check_type_of_gguf(config, model_path)
            config = complete_config(config, model_path)
            config.name_or_path = model_path
        check_unquantised(config, model_path)
        if config.model_type in WRAPPER_TYPES:
            config = _language_model_config(config, model_path, language_model)
        family = FAMILIES.get(config.model_type)
        if family and family.like:
            # Saved with the masked and the pruned model, which load by it.
            setattr(config, LIKE_KEY, family.like)
        untie_stored_head(config, model_path)
        check_padding_id(config, model_path)
        if arguments:
            check_weights_of_gguf(model_path, config)
        return config


@contextmanager
def _naming_adapter(model_path: str) -> Iterator[None]:
    """Context in which errors of the base of an adapter name the adapter ``model_path`` too."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model {model_path}: {error}; its adapter_config.json sets {BASE_KEY}") from error


def _language_model_config(config: PreTrainedConfig, model_path: str, requested: bool) -> PreTrainedConfig:
    if not requested:
        raise UserError(
            f"model {model_path}: '{config.model_type}' is a multimodal model; use its language model, which "
            f"model_slimming.py --text_only saves as a model of its own (unpruned with --sparsity 0)"
        )
    try:
        return language_model_config(config)
    except ValueError as error:
        raise UserError(f"model {model_path}: {error}; docs/families.md lists the types") from None


def is_multimodal_checkpoint(model_path: str) -> bool:
    """Return whether a checkpoint is of a multimodal type whose language model can be loaded."""
    folder, arguments = gguf_arguments(base_checkpoint(model_path))
    return not arguments and PreTrainedConfig.get_config_dict(folder)[0].get("model_type") in WRAPPER_TYPES


def load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint or GGUF file; for an adapter without one, that of its base.

    The chat template may be that of the checkpoint's processor.
    """
    _, *bases = merged_models(model_path)
    if bases and not any(stored_file(model_path, name) for name in TOKENIZER_FILES):
        return load_tokenizer(bases[0], trust_remote_code)
    folder, arguments = gguf_arguments(model_path)
    with loading(model_path):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **arguments)
        if arguments:
            complete_tokenizer(tokenizer, model_path)
        template = Path(model_path) / PROCESSOR_TEMPLATE_FILE
        if not tokenizer.chat_template and template.is_file():
            tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
        return tokenizer


def stored_file(model_path: str, name: str) -> Path | None:
    """Path of the file ``name`` of a checkpoint, a folder or hub name; ``None`` without one, or without connection."""
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(model_path, name, **optional)
    return Path(found) if found else None


def load_model(
    model_path: str, dtype: str, trust_remote_code: bool, language_model: bool = False, **options: Any
) -> PreTrainedModel:
    """Causal language model of a checkpoint, on the CPU by default.

    Args:
        model_path: checkpoint folder, hub name, GGUF file, or LoRA adapter, which is merged into its base.
        dtype: key of ``DTYPES``.
        trust_remote_code: run model code found in the checkpoint.
        language_model: of a multimodal model, load its language model alone.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: if the checkpoint cannot be loaded or is quantised, or its weights do not match its configuration.
    """
    note = input_format(model_path)
    if note:
        if "device_map" in options:
            check_undivided(model_path, note)
        logger.info("model %s: %s", model_path, note)
    _, *bases = merged_models(model_path)
    if bases:
        with _naming_adapter(model_path):
            model = load_model(bases[0], dtype, trust_remote_code, language_model, **options)
        with loading(model_path):
            model = fuse_adapters(model, model_path)
        # What is trained on the model belongs to it, not to the base.
        model.config.name_or_path = model.name_or_path = model_path
        return model
    stored = check_files(model_path)
    config = load_config(model_path, trust_remote_code, language_model)
    if note:
        with loading(model_path):
            return load_gguf(model_path, config, DTYPES[dtype]).eval()
    multimodal = is_multimodal_checkpoint(model_path)
    with loading(model_path), experts_as_stored(config) if multimodal else nullcontext():
        names = LANGUAGE_MODEL_NAMES if multimodal else {}
        renamings = check_weights(model_path, config, names, trust_remote_code=trust_remote_code)
        if renamings:
            options["key_mapping"] = renamings
        with capture_load_report():
            model = AutoModelForCausalLM.from_pretrained(
                model_path, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, **options
            )
    log_narrowed(model_path, stored, model.dtype)
    if renamings:
        # Otherwise the library would save the weights under their stored names.
        model._weight_conversions = None
    if getattr(model.config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        # The library loaded both matrices and found that they differ.
        model.config.tie_word_embeddings = False
        log_untied_head(model_path)
    return model.eval()


def load_multimodal_model(model_path: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """Multimodal model of a checkpoint, on the CPU; its weights are checked when its language model is loaded.

    Raises:
        UserError: if the checkpoint cannot be loaded.
    """
    with loading(model_path), capture_load_report():
        return AutoModelForImageTextToText.from_pretrained(
            model_path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        ).eval()


def model_on_meta(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Causal language model of ``config`` on the meta device; ``options`` are arguments of ``from_config``.

    Raises:
        UserError: if the installed transformers cannot build the model.
    """
    with building(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options).eval()


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and chat template.

    The SentencePiece model of the tokenizer is copied if there is one: transformers only needs ``tokenizer.json``, but
    other programs read scores and normalisation from it. ``options`` are arguments of ``save_pretrained``.
    """
    model.save_pretrained(folder, **options)
    # The LLaMA tokenizer does not save whether text after a special token starts with a space.
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(folder)
    vocab_file, copy = getattr(tokenizer, "vocab_file", None), folder / SENTENCEPIECE_FILE
    if vocab_file and Path(vocab_file).name == SENTENCEPIECE_FILE and Path(vocab_file).is_file() and not copy.exists():
        shutil.copyfile(vocab_file, copy)


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: of the host and, for a CUDA device, of the GPU."""
    if resource is None:
        host = psutil.Process().memory_info().peak_wset / (1 << 20)
    else:
        # KiB on Linux, bytes on macOS.
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    peaks = {"host": round(host, 1)}
    if device.type == "cuda":
        peaks["gpu"] = round(torch.cuda.max_memory_allocated(device) / (1 << 20), 1)
    return peaks
