"""What MODEL names: a checkpoint folder or hub name, a LoRA adapter, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from slim_utils.common.adapters import adapter_base, base_checkpoint
from slim_utils.common.checkpoint_checks import loading
from slim_utils.common.errors import UserError
from slim_utils.common.gguf_header import is_gguf, read_header
from slim_utils.common.weight_files import check_weight_files


def input_format(model_path: str) -> str:
    """The format of a model that is not a checkpoint, in words; empty for a checkpoint."""
    if is_gguf(model_path):
        return read_header(model_path).description
    base = adapter_base(model_path)
    if base is None:
        return ""
    name = Path(base).resolve().name if Path(base).exists() else base
    return f"LoRA adapter, merged into {name}"


def check_files(model_path: str) -> tuple[str, ...]:
    """Check the headers of the weight files of a checkpoint folder, for an adapter of its base, before any long work.

    Returns:
        Dtypes of the stored weights; empty for hub names and GGUF files.

    Raises:
        UserError: naming a missing or damaged file, or a tensor that the index promises in vain.
    """
    base = base_checkpoint(model_path)
    if is_gguf(base) or not Path(base).is_dir():
        return ()
    with loading(base):
        return check_weight_files(Path(base))


def check_input(model_path: str, divided: bool) -> None:
    """Check the files of a model, before any long work, and that one that is not a checkpoint is loaded as a whole.

    Args:
        model_path: the model.
        divided: whether the run reads it layer by layer, or divides it among devices.

    Raises:
        UserError: see :func:`check_files`; also for a divided adapter or GGUF file.
    """
    if divided:
        check_undivided(model_path, input_format(model_path))
    check_files(model_path)


def check_undivided(model_path: str, note: str) -> None:
    """Check that a model that is divided is a checkpoint.

    Args:
        model_path: the model.
        note: its :func:`input_format`.

    Raises:
        UserError: for an adapter or GGUF file.
    """
    if note:
        raise UserError(
            f"model {model_path}: a {note.split(',')[0]} is loaded as a whole; leave out --stream, --parallelize, "
            "ZeRO-3 and FSDP, or save the model as a checkpoint first"
        )
