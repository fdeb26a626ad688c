"""LoRA adapters of peft: the base that an adapter folder names, and merging into it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from slim_utils.common.errors import UserError
from slim_utils.common.weight_files import weight_paths

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FUSED_FOLDER = "lora_fused_model"
BASE_KEY = "base_model_name_or_path"


def adapter_base(model_path: str) -> str | None:
    """The model that the adapter ``model_path``, a folder or hub name, belongs to; ``None`` for any other model.

    Raises:
        UserError: if it is not an adapter that can be merged, or names no base.
    """
    file = _adapter_config(model_path)
    if file is None:
        return None
    folder = Path(model_path)
    if (folder / FUSED_FOLDER).is_dir():
        raise UserError(f"model {model_path}: a folder of adapters; use {folder / FUSED_FOLDER}, where they are fused")
    try:
        stored = weight_paths(folder)
    except ValueError as error:
        raise UserError(f"model {model_path}: {error}") from None
    if stored:
        raise UserError(f"model {model_path}: has weights of a model and {ADAPTER_CONFIG_NAME}; move one of them away")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind, base = str(config.get("peft_type")), config.get(BASE_KEY)
    except (ValueError, AttributeError):
        raise UserError(f"model {model_path}: {ADAPTER_CONFIG_NAME} is damaged; save or download it again") from None
    if kind != "LORA" or config.get("target_parameters"):
        kind = f"of type {kind}" if kind != "LORA" else "on parameters of experts"
        raise UserError(f"model {model_path}: an adapter {kind}; only LoRA on modules can be merged into its base")
    if not isinstance(base, str) or not base or Path(base).resolve() == folder.resolve():
        raise UserError(f"model {model_path}: an adapter without a base; set {BASE_KEY} in its {ADAPTER_CONFIG_NAME}")
    return base


def base_checkpoint(model_path: str) -> str:
    """``model_path`` or, for an adapter, the model that it is merged into; adapters of adapters are followed.

    Raises:
        UserError: see :func:`merged_models`.
    """
    return merged_models(model_path)[-1]


def merged_models(model_path: str) -> list[str]:
    """``model_path`` and, for an adapter, its base; adapters of adapters are followed up to a checkpoint.

    Raises:
        UserError: see :func:`adapter_base`; also if adapters are bases of each other.
    """
    visited = [model_path]
    while (base := adapter_base(visited[-1])) is not None:
        if base in visited:
            raise UserError(f"model {model_path}: adapters that are bases of each other; set {BASE_KEY}")
        visited.append(base)
    return visited


def _adapter_config(model_path: str) -> Path | None:
    if Path(model_path).exists():
        file = Path(model_path) / ADAPTER_CONFIG_NAME
        return file if file.is_file() else None
    return None if model_path.startswith((".", "/", "~")) else _hub_adapter_config(model_path)


@cache
def _hub_adapter_config(name: str) -> Path | None:
    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):
        # Loading the model fails with a message.
        return None
    return Path(found) if found else None


@torch.no_grad()
def fuse_adapters(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """``model`` with the LoRA adapter in ``adapter`` fused in, in its dtype.

    ``W + (alpha/r)·B·A`` is computed in fp32 and rounded once. If embedding and head are tied and one of them is
    adapted, the fused model is untied (``tie_word_embeddings`` false).

    Args:
        model: the base.
        adapter: folder or hub name.
    """
    from peft.tuners.lora import LoraLayer

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    adapted = load_adapters(model, adapter)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    if tied and any(layer.get_base_layer() in (embedding, head) for layer in layers):
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    merge_adapters(adapted)
    fused: PreTrainedModel = adapted.unload().eval()
    # peft froze the base, of which some parameters never get gradients.
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(name not in frozen)
    # Older versions of peft leave it there, and would warn of a second adapter.
    vars(fused).pop("peft_config", None)
    # Also where the adapter stores one of them as a whole (modules_to_save).
    if tied and fused.get_output_embeddings().weight is not fused.get_input_embeddings().weight:
        fused.config.tie_word_embeddings = False
        fused.all_tied_weights_keys = {}
        logger.info("embedding and head are adapted differently: the fused model is saved with an untied head")
    return fused


def load_adapters(model: PreTrainedModel, adapter: str) -> PeftModel:
    """``model`` with the adapters in ``adapter``, a folder or hub name.

    Raises:
        UserWarning: if the file lacks adapters that its configuration lists.
    """
    from peft import PeftModel

    with ignore_tied_embeddings_warning():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, adapter)


@contextmanager
def ignore_tied_embeddings_warning() -> Iterator[None]:
    """Suppress peft's warning about adapters on tied embeddings, which :func:`fuse_adapters` unties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*part of the adapter")
        yield


@torch.no_grad()
def merge_adapters(module: nn.Module) -> None:
    """Add the adapters in ``module`` to the weights that they adapt, computed in fp32 and rounded once."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            layer.merge()
            weight.data = weight.data.to(dtype)
