"""Loading models, choosing devices, and writing outputs atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

import models  # noqa: F401 - registers the classes of pruned checkpoints
from models.families import FAMILIES
from models.like import LIKE_KEY, add_row_of
from slim_utils.common.adapters import BASE_KEY, adapter_base, base_checkpoint, fuse_adapters
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
from slim_utils.common.gguf_input import check_architecture, check_weights_of_gguf, gguf_arguments, load_gguf
from slim_utils.common.input_checks import check_padding_id
from slim_utils.common.model_source import check_files, check_input, input_format
from slim_utils.common.output_folder import (
    RUN_FILE,
    backup_paths,
    hidden_path,
    is_fixed,
    make_parent,
    output_entries,
    replace_entries,
)

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


def choose_local_device(name: str) -> torch.device:
    """The device ``name`` of ``--device`` for this process: ``auto`` and ``cuda`` are the GPU of its local rank.

    Raises:
        UserError: if the device does not exist, or a machine has fewer GPUs than processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if processes > devices:
            raise UserError(
                f"--device {name}: {processes} processes on a machine with {devices} CUDA devices; start one for each"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda:") and processes > 1:
        logger.warning("--device %s: all processes use this GPU; leave it out for one GPU each", name)
    return choose_device(name)


def load_config(model_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Configuration of a checkpoint (folder or hub name), without its weights.

    Raises:
        UserError: if the configuration cannot be read or is inconsistent, or the weights are quantised.
    """
    base = base_checkpoint(model_path)
    if base != model_path:
        try:
            return load_config(base, trust_remote_code)
        except UserError as error:
            raise UserError(f"model {model_path}: {error}; its adapter_config.json sets {BASE_KEY}") from error
    folder, arguments = gguf_arguments(model_path)
    with loading(model_path):
        if arguments:
            check_architecture(model_path)
        else:
            add_row_of(PreTrainedConfig.get_config_dict(folder)[0])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **arguments)
        family = FAMILIES.get(config.model_type)
        if family and family.like:
            # Saved with the masked and the pruned model, which load by it.
            setattr(config, LIKE_KEY, family.like)
        untie_stored_head(config, model_path)
        check_unquantised(config, model_path)
        check_padding_id(config, model_path)
        if arguments:
            config.name_or_path = model_path
            check_weights_of_gguf(model_path, config)
        return config


def load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint or GGUF file; for an adapter without one, that of its base."""
    base = adapter_base(model_path)
    if base is not None and not any((Path(model_path) / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(base, trust_remote_code)
    folder, arguments = gguf_arguments(model_path)
    with loading(model_path):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **arguments)


def load_model(model_path: str, dtype: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Causal language model of a checkpoint, on the CPU by default.

    Args:
        model_path: checkpoint folder, hub name, GGUF file, or LoRA adapter, which is merged into its base.
        dtype: key of ``DTYPES``.
        trust_remote_code: run model code found in the checkpoint.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: if the checkpoint cannot be loaded or is quantised, or its weights do not match its configuration.
    """
    note = input_format(model_path)
    if note:
        check_input(model_path, divided="device_map" in options)
        logger.info("model %s: %s", model_path, note)
    base = adapter_base(model_path)
    if base is not None:
        load_config(model_path, trust_remote_code)
        model = load_model(base, dtype, trust_remote_code, **options)
        with loading(model_path):
            model = fuse_adapters(model, model_path)
        # What is trained on the model belongs to it, not to the base.
        model.config.name_or_path = model.name_or_path = model_path
        return model
    stored = check_files(model_path)
    config = load_config(model_path, trust_remote_code)
    if note:
        with loading(model_path):
            return load_gguf(model_path, config, DTYPES[dtype]).eval()
    with loading(model_path):
        renamings = check_weights(model_path, config, trust_remote_code=trust_remote_code)
        if renamings:
            options["key_mapping"] = renamings
        with capture_load_report():
            model = AutoModelForCausalLM.from_pretrained(
                model_path, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, **options
            )
    log_narrowed(model_path, stored, model.dtype)
    if renamings:
        # Otherwise the library would save the weights under their wrapped names.
        model._weight_conversions = None
    if getattr(model.config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        # The library loaded both matrices and found that they differ.
        model.config.tie_word_embeddings = False
        log_untied_head(model_path)
    return model.eval()


def model_on_meta(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Causal language model of ``config`` on the meta device; ``options`` are arguments of ``from_config``.

    Raises:
        UserError: if the installed transformers cannot build the model.
    """
    with building(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options).eval()


def check_output(
    save_dir: Path, overwrite: bool, flag: str = "--save_dir", markers: tuple[str, ...] = (RUN_FILE,)
) -> None:
    """Check, before any long work, that the folder ``save_dir``, given as ``flag``, can be written.

    Only an earlier output, i.e. a folder with all files of ``markers``, may be overwritten.

    Raises:
        UserError: if the folder exists without ``overwrite``, is not an earlier output, or is not writable.
    """
    make_parent(save_dir, flag)
    if save_dir.exists():
        occupied = not save_dir.is_dir() or any(output_entries(save_dir))
        if occupied and not overwrite:
            raise UserError(f"{flag} {save_dir}: exists; choose another or pass --overwrite")
        for name in markers:
            if occupied and not (save_dir / name).is_file():
                raise UserError(f"{flag} {save_dir}: not the output of an earlier run (no {name}); not overwritten")
    staging_parent = hidden_path(save_dir, "partial-").parent
    if not os.access(staging_parent, os.W_OK):
        raise UserError(f"{flag} {save_dir}: {staging_parent} is not writable")


def check_output_file(path: Path, overwrite: bool, flag: str) -> None:
    """Check, before any long work, that the file ``path``, given as ``flag``, can be written.

    Raises:
        UserError: if the file exists without ``overwrite``, or its folder does not exist.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path}: exists; choose another or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder {path.absolute().parent}")


def warn_if_short_of_space(save_dir: Path, model: PreTrainedModel, copies: int) -> None:
    """Warn, before any long work, if ``copies`` checkpoints of the size of ``model`` may not fit on the disk."""
    needed = copies * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(hidden_path(save_dir, "partial-").parent).free
    if free < needed:
        gib = 1 << 30
        logger.warning("--save_dir %s: needs up to %.1f GiB, %.1f GiB are free", save_dir, needed / gib, free / gib)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` if the block succeeds, and is removed otherwise.

    A symbolic link is followed: its target is replaced. If the folder cannot be renamed, its entries are replaced.
    """
    target = target.resolve()
    if is_fixed(target):
        with _staging_folder(target) as partial:
            yield partial
            replace_entries(partial, target, output_entries(target))
        return
    with _staging_folder(target) as partial:
        old = partial.with_name(f"{partial.name}-old")
        try:
            yield partial
            # mkdtemp creates private folders; the output gets ordinary permissions.
            partial.chmod(0o777 & ~_umask())
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``target``, a resolved path; removed afterwards if it still exists."""
    prefix = hidden_path(target, "partial-")
    partial = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
    try:
        yield partial
    finally:
        # An unfinished replacement is left to clear_leftovers.
        if not any(path.exists() for path in backup_paths(partial)):
            shutil.rmtree(partial, ignore_errors=True)


def scratch_folder(target: Path) -> Path:
    """Folder on the file system of ``target`` for temporary files of this process of a run."""
    return hidden_path(target, f"scratch-{os.environ.get('RANK', '0')}")


@contextmanager
def atomic_entries(target: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into the folder ``target`` if the block succeeds.

    Every entry is moved atomically and replaces an entry of the same name; ``RUN_FILE`` is moved last.
    """
    target = target.resolve()
    with _staging_folder(target) as partial:
        yield partial
        namesakes = [target / entry.name for entry in partial.iterdir() if (target / entry.name).exists()]
        replace_entries(partial, target, namesakes)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it if the block succeeds, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as json to ``path`` atomically."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def save_tensors_atomic(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, synced to disk before it is renamed."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        # Sync before the rename.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
