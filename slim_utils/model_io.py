"""Loading models, choosing devices, and writing output folders that appear whole or not at all."""

import glob
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slim_utils.checkpoint_checks import (
    building,
    check_unquantised,
    check_weights,
    load_report,
    loading,
    log_own_head,
    untie_own_head,
)
from slim_utils.errors import UserError
from slim_utils.input_checks import check_padding_id

logger = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUN_FILE = "run.json"
SMALL_MODEL_FOLDER = "pruned_weights"


def choose_device(name: str, flag: str = "--device") -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: if there is no such device here.
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


def load_config(model_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Configuration of a checkpoint (folder or hub name), without its weights.

    Raises:
        UserError: if it cannot be read, says that the weights are quantised, or contradicts itself.
    """
    with loading(model_path):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        untie_own_head(config, model_path)
        check_unquantised(config, model_path)
        check_padding_id(config, model_path)
        return config


def load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint."""
    with loading(model_path):
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)


def load_model(model_path: str, dtype: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Causal language model of a checkpoint, in the given dtype (a key of ``DTYPES``); on the CPU unless ``options``,
    those of the library's ``from_pretrained``, say otherwise.

    Raises:
        UserError: if it cannot be loaded, is quantised, or its weights are not those of its configuration.
    """
    config = load_config(model_path, trust_remote_code)
    with loading(model_path):
        renamings = check_weights(model_path, config, trust_remote_code=trust_remote_code)
        if renamings:
            options["key_mapping"] = renamings
        with load_report():
            model = AutoModelForCausalLM.from_pretrained(
                model_path, config=config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, **options
            )
    if renamings:
        # Else the library would save them under their old names again.
        model._weight_conversions = None
    if getattr(model.config, "tie_word_embeddings", False) and not model.all_tied_weights_keys:
        # The library has read both, and found them to differ.
        model.config.tie_word_embeddings = False
        log_own_head(model_path)
    return model.eval()


def model_on_meta(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of a configuration, without weights; ``options`` are those of ``from_config``.

    Raises:
        UserError: if the installed library cannot make it.
    """
    with building(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options).eval()


def check_output(
    save_dir: Path, overwrite: bool, flag: str = "--save_dir", written: tuple[str, ...] = (RUN_FILE,)
) -> None:
    """Make sure, before any long work, that ``save_dir``, given as ``flag``, can be written.

    Only an earlier output, which has all the files of ``written``, may be overwritten.

    Raises:
        UserError: if it exists and ``overwrite`` is not set, or is not an earlier run's, or cannot be written.
    """
    if save_dir.exists():
        occupied = not save_dir.is_dir() or any(save_dir.iterdir())
        if occupied and not overwrite:
            raise UserError(f"{flag} {save_dir}: exists; choose another or pass --overwrite")
        for name in written:
            if occupied and not (save_dir / name).is_file():
                raise UserError(f"{flag} {save_dir}: not the output of an earlier run (no {name}); not overwritten")
    try:
        save_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {save_dir}: {error.strerror}") from error
    if not os.access(save_dir.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {save_dir}: {save_dir.absolute().parent} is not writable")


def check_output_file(path: Path, overwrite: bool, flag: str) -> None:
    """Make sure, before any long work, that the file ``path``, given as ``flag``, can be written.

    Raises:
        UserError: if it exists and ``overwrite`` is not set, or its folder does not.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path}: exists; choose another or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no folder {path.absolute().parent}")


def warn_if_short_of_space(save_dir: Path, model: PreTrainedModel, copies: int) -> None:
    """Say, before any long work, that ``copies`` checkpoints of the size of ``model`` may not fit."""
    needed = copies * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(save_dir.absolute().parent).free
    if free < needed:
        gib = 1 << 30
        logger.warning("--save_dir %s: up to %.1f GiB to write, %.1f GiB free", save_dir, needed / gib, free / gib)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well, and is removed otherwise."""
    target = target.absolute()
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    old = partial.with_name(f"{partial.name}-old")
    try:
        yield partial
        # mkdtemp makes private folders; this one becomes an ordinary one.
        partial.chmod(0o777 & ~_umask())
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def scratch_folder(target: Path) -> Path:
    """A folder beside ``target`` for what a run needs as long as it goes, of each of its processes."""
    return target.absolute().with_name(f".{target.name}.scratch-{os.environ.get('RANK', '0')}")


def clear_leftovers(target: Path) -> None:
    """Remove what :func:`atomic_folder` could not when it was killed; what it had put aside comes back."""
    target = target.absolute()
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*-old"):
        if not target.exists():
            leftover.rename(target)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def atomic_entries(target: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into the folder ``target`` when the block ends well.

    Each entry is whole or absent, replaces its namesake, and ``RUN_FILE`` comes last: where it is, all are.
    """
    target = target.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as name:
        partial = Path(name)
        yield partial
        for entry in sorted(partial.iterdir(), key=lambda path: path.name == RUN_FILE):
            old = target / entry.name
            if old.is_dir():
                shutil.rmtree(old)
            entry.replace(old)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block ends well, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` by ``content`` as json, whole or not at all."""
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def save_tensors_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all, also where the machine goes down."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        # On disk before it has its name.
        with partial.open("rb") as file:
            os.fsync(file.fileno())


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and chat template.

    ``options`` are those of the library's ``save_pretrained``.
    """
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the GPU, or available on the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: of the host, and of the GPU where one is used."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    peaks = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.type == "cuda":
        peaks["gpu"] = round(torch.cuda.max_memory_allocated(device) / (1 << 20), 1)
    return peaks


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
