"""LoRA with peft: choose target modules, add adapters, fuse them into a checkpoint."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from slim_utils.common.adapters import fuse_adapters, ignore_tied_embeddings_warning
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model, model_on_meta
from slim_utils.families import FAMILIES, Family, layer_shapes
from train_utils.finetune_args import ModelArguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


ALL_LINEAR = "all-linear"
TARGETS_FLAG = "--peft_target_modules"
# Modules that peft can adapt.
_ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)


def check_lora_targets(args: ModelArguments, config: PreTrainedConfig) -> None:
    """Check ``--peft_target_modules`` against the model, before its weights are loaded.

    Raises:
        UserError: naming the targets that match no linear module.
    """
    if not args.use_lora:
        return
    try:
        model = model_on_meta(config, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        # Loading the model later fails with a message for the user.
        logger.debug("the model cannot be built: %s", error)
        return
    lora_targets(model, args.peft_target_modules)


def lora_targets(model: PreTrainedModel, text: str | None) -> list[str] | str:
    """Value of peft's ``target_modules`` for ``--peft_target_modules text``.

    In MoE models, blocks with experts are not adapted, except where every layer is a single block: experts and routers
    are not linear modules.

    Args:
        model: the model to adapt.
        text: comma-separated suffixes of module names; ``all-linear`` for all linear modules except the head; ``None``
            for the linear modules of the family's decoder layers.

    Raises:
        UserError: naming the targets that match no linear module.
    """
    family = FAMILIES.get(model.config.model_type)
    mixture = family if family and any(shape.num_experts for shape in layer_shapes(model.config)) else None
    adaptable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _ADAPTABLE) and not (mixture and _beside_experts(name, mixture))
    ]
    if text is None:
        return _family_targets(family, adaptable) if family else ALL_LINEAR
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{TARGETS_FLAG} {text}: give at least one name, or {ALL_LINEAR}")
    if ALL_LINEAR in map(str.lower, names):
        if len(names) > 1:
            raise UserError(f"{TARGETS_FLAG} {text}: {ALL_LINEAR} excludes other names; leave them out")
        # In MoE models, peft's all-linear would include routers and experts.
        return _family_targets(mixture, adaptable) if mixture else ALL_LINEAR
    missing = [name for name in names if not _matches(name, adaptable)]
    if missing:
        present = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in adaptable))
        raise UserError(
            f"{TARGETS_FLAG} {text}: the model has no linear module {', '.join(missing)}; "
            f"choose among {present}, or {ALL_LINEAR}"
        )
    return names


def _beside_experts(name: str, family: Family) -> bool:
    """Whether the module ``name`` is in a block that has experts; never where every layer is a single block."""
    return not family.single_blocks and f".{family.experts.partition('.')[0]}." in name


def _family_targets(family: Family, adaptable: list[str]) -> list[str]:
    """Names of the linear modules of the family's decoder layers that are in ``adaptable``."""
    rows = [name for name, _ in (*family.attention_rows, *family.mlp_rows)]
    names = [name.rpartition(".")[2] for name in (*rows, family.attention_out, family.mlp_out)]
    return [name for name in names if _matches(name, adaptable)]


def _matches(name: str, modules: list[str]) -> bool:
    """Whether ``name`` equals one of ``modules`` or is a suffix of one, as in peft."""
    return any(module == name or module.endswith(f".{name}") for module in modules)


def add_lora(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    """``model`` with an adapter on every target module; all other weights are frozen.

    Raises:
        UserError: naming the targets that match no linear module.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=lora_targets(model, args.peft_target_modules),
        r=args.peft_lora_r,
        lora_alpha=args.peft_lora_alpha,
        lora_dropout=args.peft_lora_dropout,
        bias=args.peft_lora_bias,
    )
    try:
        with ignore_tied_embeddings_warning():
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{TARGETS_FLAG} {args.peft_target_modules}: {' '.join(str(error).split())}") from error


def fuse_lora(model_path: str, adapter_dir: str, trust_remote_code: bool) -> PreTrainedModel:
    """The checkpoint ``model_path`` with the adapters in ``adapter_dir`` fused in, in its dtype and format."""
    return fuse_adapters(load_model(model_path, "auto", trust_remote_code), adapter_dir)
