"""What a run trains: LoRA adapters, all weights, those of the decoder layers, or one scale per head and column."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slim_utils.common.loading import load_model
from slim_utils.families import Family, LayerShape, as_linear, find_family, layer_shapes
from train_utils.finetune_args import FinetuneArguments, TrainingArguments
from train_utils.lora import add_lora
from train_utils.text_defaults import BLOCK_WEIGHTS, LORA, SCALES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SCALE = "slim_scale"


def prepare_model(model: PreTrainedModel, args: FinetuneArguments) -> PreTrainedModel | PeftModel:
    """``model`` with the trained part of ``--train`` in fp32 and everything else frozen, in :func:`frozen_dtype`."""
    training, part = args.training, args.model.trained_part
    if part == LORA:
        cast_parameters(model, frozen_dtype(training))
        if training.gradient_checkpointing:
            model.enable_input_require_grads()
        adapted = add_lora(model, args.model)
        cast_trained(adapted)
        if training.process_index == 0:
            adapted.print_trainable_parameters()
        return adapted
    if part == BLOCK_WEIGHTS:
        train_only(model, find_family(model.config).decoder_layers(model).parameters(), training)
    elif part == SCALES:
        train_only(model, add_scales(model).values(), training)
    else:
        cast_parameters(model, torch.float32)
    return model


def train_only(model: PreTrainedModel, parameters: Iterable[nn.Parameter], training: TrainingArguments) -> None:
    """Freeze everything but ``parameters``, and those of them that never get gradients, such as biases of a router."""
    chosen = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in chosen else frozen_dtype(training))
    if training.gradient_checkpointing:
        model.enable_input_require_grads()


def frozen_dtype(training: TrainingArguments) -> torch.dtype:
    """Dtype of frozen weights: bf16, fp16 or fp32, as used for computation."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all parameters to ``dtype``; buffers (rotary frequencies) keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def cast_trained(model: nn.Module) -> None:
    """Cast the trained parameters of ``model`` to fp32, and the vectors beside them, such as the weight of a norm."""
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in parameters):
            for parameter in parameters:
                if parameter.requires_grad or parameter.ndim == 1:
                    parameter.data = parameter.data.float()


def scaled_maps(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, int]]:
    """Name of its scale, linear map and columns per unit of every output map of heads and of FFN columns."""
    family, shapes = find_family(model.config), layer_shapes(model.config)
    for index, (layer, shape) in enumerate(zip(family.decoder_layers(model), shapes, strict=True)):
        for name, unit_size in output_maps(family, shape):
            yield f"{family.layers}.{index}.{name}.{SCALE}", layer.get_submodule(name), unit_size


def output_maps(family: Family, shape: LayerShape) -> list[tuple[str, int]]:
    """Names of a layer's output maps, and their columns per unit."""
    heads = [(family.attention_out, shape.head_dim)] if shape.num_heads else []
    columns = [(family.mlp_out, 1)] if shape.num_columns and not shape.num_experts else []
    return [*heads, *columns]


def add_scales(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Multiply every head and FFN column of ``model`` by a trained scale, 1 at first; the scales by name."""

    def multiply(linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale: Tensor = getattr(linear, SCALE)
        return (inputs[0] * scale.repeat_interleave(inputs[0].shape[-1] // len(scale)).to(inputs[0].dtype), *inputs[1:])

    scales = {}
    for name, module, unit_size in scaled_maps(model):
        weight = as_linear(module, name).weight
        scale = nn.Parameter(torch.ones(weight.shape[1] // unit_size, device=weight.device))
        module.register_parameter(SCALE, scale)
        module.register_forward_pre_hook(multiply)
        scales[name] = scale
    return scales


@torch.no_grad()
def with_trained_weights(model_path: str, trained: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """The checkpoint ``model_path`` with the trained weights of ``trained``, in its dtype and format."""
    model = load_model(model_path, "auto", trust_remote_code)
    weights = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            weights[name].copy_(parameter)
    return model.eval()


@torch.no_grad()
def fuse_scales(model_path: str, trained: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """The checkpoint ``model_path`` with the scales of ``trained`` folded into its weights, in its dtype and format.

    The product is computed in fp32 and rounded once.
    """
    model = load_model(model_path, "auto", trust_remote_code)
    scales = dict(trained.named_parameters())
    for name, module, unit_size in scaled_maps(model):
        weight = as_linear(module, name).weight
        factors = scales[name].detach().float().cpu().repeat_interleave(unit_size)
        weight.copy_((weight.float() * factors).to(weight.dtype))
    return model.eval()
