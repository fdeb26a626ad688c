"""LoRA adapters by peft: putting them on, and fusing them into a checkpoint."""

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from slim_utils.errors import UserError
from slim_utils.model_io import load_model
from train_utils.finetune_args import FinetuneArguments, ModelArguments, TrainingArguments


def add_lora(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    """``model`` with an adapter on every linear map that ``--peft_target_modules`` names; all else is frozen.

    Raises:
        UserError: if the model has none of these.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=[name for name in args.peft_target_modules.split(",") if name],
        r=args.peft_lora_r,
        lora_alpha=args.peft_lora_alpha,
        lora_dropout=args.peft_lora_dropout,
        bias=args.peft_lora_bias,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--peft_target_modules {args.peft_target_modules}: {' '.join(str(error).split())}") from error


@torch.no_grad()
def fuse_lora(model_path: str, adapter_dir: str, trust_remote_code: bool) -> PreTrainedModel:
    """The checkpoint ``model_path`` plus the adapters in ``adapter_dir``, in the checkpoint's dtype and format.

    ``W + (alpha/r)·B·A`` is computed in fp32 and rounded once.
    """
    model = load_model(model_path, "auto", trust_remote_code)
    adapted = PeftModel.from_pretrained(model, adapter_dir)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge()
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
