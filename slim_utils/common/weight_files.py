"""Checks of the weight files of a checkpoint folder by their headers, before any weight is read."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from slim_utils.common.errors import UserError

# In the order in which transformers looks for them: a file, or the index of several.
_WHOLE_FILES = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
# What the unpickler of torch.load with weights_only says about objects that are not tensors.
_FORBIDDEN_OBJECT = re.compile(r"(?:GLOBAL|class|got <class) '?([\w.]+)")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TORCH_FLOATS = {getattr(torch, name): short for short, name in _FLOATS.items()}
DAMAGED = "damaged or incomplete; download or save it again"


def check_weight_files(folder: Path) -> tuple[str, ...]:
    """Check that every weight file of ``folder`` is complete, and has the tensors that the index promises.

    Args:
        folder: checkpoint folder; without weight files, nothing is checked.

    Returns:
        Floating-point dtypes of the weights: ``bfloat16``, ``float32``, …

    Raises:
        ValueError: naming the file, in one line.
        UserError: if weights are stored in a dtype of quantised ones.
    """
    index, files = _indexed_files(folder)
    dtypes: set[str] = set()
    for file, promised in files.items():
        stored = _stored_dtypes(folder / file)
        absent = sorted(promised - stored.keys())
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise ValueError(f"{index} lists {absent[0]}{more} in {file}, which does not have it; {DAMAGED}")
        for name, dtype in stored.items():
            if _is_quantised(name, dtype):
                raise UserError(
                    f"model {folder}: {name} in {file} is stored as {dtype}, without the settings of a quantiser in "
                    "config.json; use the unquantised checkpoint"
                )
        dtypes.update(stored.values())
    return tuple(sorted(dtypes & set(_FLOATS.values())))


def weight_paths(folder: Path) -> list[Path]:
    """Paths of the weight files of ``folder`` that transformers would load; none without such files."""
    return [folder / name for name in _indexed_files(folder)[1]]


def unpickling_reason(error: pickle.UnpicklingError) -> str:
    """What a pickled file holds besides tensors, or that it is damaged."""
    forbidden = _FORBIDDEN_OBJECT.search(str(error))
    if not forbidden:
        return DAMAGED
    return f"holds a {forbidden[1]}, which takes code to unpickle, and that is never run; save it as safetensors"


def _indexed_files(folder: Path) -> tuple[str, dict[str, set[str]]]:
    """Name of the index, if any, and the tensors that it promises by file."""
    for file, index in _WHOLE_FILES:
        if (folder / file).exists():
            return "", {file: set()}
        if (folder / index).exists():
            return index, _read_index(folder / index)
    return "", {}


def _read_index(path: Path) -> dict[str, set[str]]:
    files: dict[str, set[str]] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, file in content["weight_map"].items():
            files.setdefault(file, set()).add(name)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path.name}: {DAMAGED}") from None
    outside = [file for file in files if Path(file).name != file]
    if outside or not files:
        raise ValueError(f"{path.name}: " + (f"lists {outside[0]}, outside of the folder" if outside else DAMAGED))
    return files


def _stored_dtypes(path: Path) -> Mapping[str, str]:
    """Dtypes of the tensors in a weight file, by name."""
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file in {path.parent}; download or save it again")
    read: Callable[[Path], Mapping[str, str]] = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name}: {unpickling_reason(error)}") from error
    except Exception as error:
        # Any class, depending on where the file breaks off.
        raise ValueError(f"{path.name} ({path.stat().st_size:,} bytes): {DAMAGED}") from error


def _read_safetensors(path: Path) -> Mapping[str, str]:
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return {name: _FLOATS.get(dtype, dtype) for name, dtype in dtypes.items()}


def _read_pickle(path: Path) -> Mapping[str, str]:
    content: Any = torch.load(path, map_location="meta", weights_only=True)
    tensors = content.items() if isinstance(content, dict) else ()
    for name, value in tensors:
        if not isinstance(value, Tensor):
            raise pickle.UnpicklingError(f"{name}: got <class '{type(value).__name__}'>")
    if not tensors:
        raise EOFError
    return {
        name: _FLOATS.get(_TORCH_FLOATS.get(value.dtype, ""), str(value.dtype).removeprefix("torch."))
        for name, value in tensors
    }


def _is_quantised(name: str, dtype: str) -> bool:
    """Whether a stored dtype is that of a quantised weight; masks and positions are integers too."""
    if dtype in _FLOATS.values():
        return False
    return dtype.upper().startswith(("F8", "F6", "F4", "FLOAT8", "FLOAT4")) or name.endswith(".weight")
