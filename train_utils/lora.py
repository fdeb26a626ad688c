"""LoRA adapters by peft: putting them on, and fusing them into a checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model, model_on_meta
from slim_utils.families import FAMILIES, Family
from train_utils.finetune_args import FinetuneArguments, ModelArguments, TrainingArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


ALL_LINEAR = "all-linear"
TARGETS_FLAG = "--peft_target_modules"
# What peft has an adapter for.
_ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)


def check_lora_targets(args: ModelArguments, config: PreTrainedConfig) -> None:
    """Find the maps that ``--peft_target_modules`` names, before anything is loaded.

    Raises:
        UserError: if the model has none of one of these names.
    """
    if not args.use_lora:
        return
    try:
        model = model_on_meta(config, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        # Loading the model fails too, and says it for the user.
        logger.debug("the model cannot be built: %s", error)
        return
    lora_targets(model, args.peft_target_modules)


def lora_targets(model: PreTrainedModel, text: str | None) -> list[str] | str:
    """Names of the maps that get an adapter, as peft takes them.

    In mixtures of experts, only the attention is adapted: experts are 3-D parameters, and so are routers.

    Args:
        model: to be adapted.
        text: names, comma-separated, each the end of a module's full name; ``all-linear``, which is all linear maps but
            the head; ``None`` for the linear maps of the decoder layers, by the family.

    Raises:
        UserError: if the model has none of one of these names.
    """
    family = FAMILIES.get(model.config.model_type)
    mixture = family if family and family.expert_columns_key else None
    ffn = f".{mixture.experts.partition('.')[0]}." if mixture else None
    adaptable = [
        name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE) and not (ffn and ffn in name)
    ]
    if text is None:
        return _family_targets(family, adaptable) if family else ALL_LINEAR
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{TARGETS_FLAG} {text}: give at least one name, or {ALL_LINEAR}")
    if ALL_LINEAR in map(str.lower, names):
        if len(names) > 1:
            raise UserError(f"{TARGETS_FLAG} {text}: {ALL_LINEAR} stands alone; leave out the other names")
        # In mixtures peft's own takes routers and experts too.
        return _family_targets(mixture, adaptable) if mixture else ALL_LINEAR
    missing = [name for name in names if not _matches(name, adaptable)]
    if missing:
        present = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in adaptable))
        raise UserError(
            f"{TARGETS_FLAG} {text}: no linear map of the model is called {', '.join(missing)}; "
            f"it has: {present}, or {ALL_LINEAR}"
        )
    return names


def _family_targets(family: Family, adaptable: list[str]) -> list[str]:
    """The linear maps of the decoder layers of a family, as far as they are ``adaptable``."""
    rows = [name for name, _ in (*family.attention_rows, *family.mlp_rows)]
    names = [name.rpartition(".")[2] for name in (*rows, family.attention_out, family.mlp_out)]
    return [name for name in names if _matches(name, adaptable)]


def _matches(name: str, modules: list[str]) -> bool:
    """Whether ``name`` is, by peft's rule, one of ``modules`` or the end of one."""
    return any(module == name or module.endswith(f".{name}") for module in modules)


def add_lora(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    """``model`` with an adapter on every linear map that ``--peft_target_modules`` names; all else is frozen.

    Raises:
        UserError: if the model has none of one of these names.
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
        with _tied_embeddings_allowed():
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{TARGETS_FLAG} {args.peft_target_modules}: {' '.join(str(error).split())}") from error


@contextmanager
def _tied_embeddings_allowed() -> Iterator[None]:
    """Without peft's warning of adapters on tied embeddings: ``fuse_lora`` unties them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*part of the adapter")
        yield


@torch.no_grad()
def fuse_lora(model_path: str, adapter_dir: str, trust_remote_code: bool) -> PreTrainedModel:
    """The checkpoint ``model_path`` plus the adapters in ``adapter_dir``, in the checkpoint's dtype and format.

    ``W + (alpha/r)·B·A`` is computed in fp32 and rounded once. Where embedding and head are one matrix and one of them
    has an adapter, the result has a head of its own (``tie_word_embeddings`` false).
    """
    model = load_model(model_path, "auto", trust_remote_code)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with _tied_embeddings_allowed():
        adapted = PeftModel.from_pretrained(model, adapter_dir)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    if head.weight is embedding.weight and any(layer.get_base_layer() in (embedding, head) for layer in layers):
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        logger.info("embedding and head differ by their adapters: the fused model is saved with a head of its own")
    for layer in layers:
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(dtype)
    return adapted.unload().eval()


def prepare_model(model: PreTrainedModel, args: FinetuneArguments) -> PreTrainedModel | PeftModel:
    """``model`` in the precision it is trained in, with its adapters.

    What is trained is fp32; what is frozen is in the precision of the products.
    """
    training = args.training
    cast_parameters(model, frozen_dtype(training) if args.model.use_lora else torch.float32)
    if not args.model.use_lora:
        return model
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    adapted = add_lora(model, args.model)
    if training.process_index == 0:
        adapted.print_trainable_parameters()
    return adapted


def frozen_dtype(training: TrainingArguments) -> torch.dtype:
    """Of weights that are not trained: that of the products."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters to ``dtype``; buffers (rotary frequencies) stay as the library keeps them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
