"""Loading models, choosing devices, and writing output folders that appear whole or not at all."""

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
)

from slim_utils.common.checkpoint_checks import (
    building,
    check_unquantised,
    check_weights,
    load_report,
    loading,
    log_own_head,
    untie_own_head,
)
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import check_padding_id
from slim_utils.common.output_folder import (
    RUN_FILE,
    hidden_path,
    is_fixed,
    make_parent,
    output_entries,
    put_aside,
    replace_entries,
)

if TYPE_CHECKING:
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

try:
    import resource
except ImportError:
    # On Windows.
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SMALL_MODEL_FOLDER = "pruned_weights"
SENTENCEPIECE_FILE = "tokenizer.model"


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


def _register_slim_classes() -> None:
    """Let the library load pruned checkpoints without code of theirs."""
    # Takes seconds, with the library's own modeling code.
    import models  # noqa: F401


def load_config(model_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Configuration of a checkpoint (folder or hub name), without its weights.

    Raises:
        UserError: if it cannot be read, says that the weights are quantised, or contradicts itself.
    """
    _register_slim_classes()
    with loading(model_path):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        untie_own_head(config, model_path)
        check_unquantised(config, model_path)
        check_padding_id(config, model_path)
        return config


def load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint."""
    _register_slim_classes()
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
    make_parent(save_dir, flag)
    if save_dir.exists():
        occupied = not save_dir.is_dir() or any(output_entries(save_dir))
        if occupied and not overwrite:
            raise UserError(f"{flag} {save_dir}: exists; choose another or pass --overwrite")
        for name in written:
            if occupied and not (save_dir / name).is_file():
                raise UserError(f"{flag} {save_dir}: not the output of an earlier run (no {name}); not overwritten")
    place = hidden_path(save_dir, "partial-").parent
    if not os.access(place, os.W_OK):
        raise UserError(f"{flag} {save_dir}: {place} is not writable")


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
    free = shutil.disk_usage(hidden_path(save_dir, "partial-").parent).free
    if free < needed:
        gib = 1 << 30
        logger.warning("--save_dir %s: up to %.1f GiB to write, %.1f GiB free", save_dir, needed / gib, free / gib)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and is removed otherwise.

    A symbolic link stays, and its target is replaced; of a folder that cannot be renamed the entries are replaced.
    """
    target = target.resolve()
    if is_fixed(target):
        with _staged(target) as partial:
            yield partial
            replace_entries(partial, target, output_entries(target))
        return
    with _staged(target) as partial:
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


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``target``, a resolved path; it is removed if it is still there."""
    prefix = hidden_path(target, "partial-")
    partial = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
    try:
        yield partial
    finally:
        # What could not even be settled stays for clear_leftovers.
        if not any(path.exists() for path in put_aside(partial)):
            shutil.rmtree(partial, ignore_errors=True)


def scratch_folder(target: Path) -> Path:
    """A folder on the file system of ``target`` for what a run needs while it lasts, of each of its processes."""
    return hidden_path(target, f"scratch-{os.environ.get('RANK', '0')}")


@contextmanager
def atomic_entries(target: Path) -> Iterator[Path]:
    """A temporary folder whose entries move into the folder ``target`` when the block ends well.

    Each entry is whole or absent, replaces its namesake, and ``RUN_FILE`` comes last: where it is, all are.
    """
    target = target.resolve()
    with _staged(target) as partial:
        yield partial
        namesakes = [target / entry.name for entry in partial.iterdir() if (target / entry.name).exists()]
        replace_entries(partial, target, namesakes)


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


def save_tensors_atomic(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all, also where the machine goes down."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        # On disk before it has its name.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and chat template.

    A SentencePiece model that the tokenizer comes with stays beside it: the library needs ``tokenizer.json`` alone, but
    other programs take scores and normalisation from there. ``options`` are those of the library's ``save_pretrained``.
    """
    model.save_pretrained(folder, **options)
    # The library's LLaMA tokenizer forgets whether text after a special token begins with a space.
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(folder)
    vocab_file, kept = getattr(tokenizer, "vocab_file", None), folder / SENTENCEPIECE_FILE
    if vocab_file and Path(vocab_file).name == SENTENCEPIECE_FILE and Path(vocab_file).is_file() and not kept.exists():
        shutil.copyfile(vocab_file, kept)


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: of the host, and of the GPU where one is used."""
    if resource is None:
        host = psutil.Process().memory_info().peak_wset / (1 << 20)
    else:
        # Linux counts in KiB, macOS in bytes.
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
