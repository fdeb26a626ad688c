"""Decoder layers built from the configuration of their own layer."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import extract_layer_index


def with_text_config(vllm_config: VllmConfig, config: Any) -> VllmConfig:
    """Shallow copy of ``vllm_config`` whose model configuration is ``config``; everything else is shared."""
    model_config = copy.copy(vllm_config.model_config)
    model_config.hf_config = model_config.hf_text_config = config
    layer_vllm_config = copy.copy(vllm_config)
    layer_vllm_config.model_config = model_config
    return layer_vllm_config


def per_layer(layer_class: type[nn.Module], vllm_config: VllmConfig, **overrides: Any) -> type[nn.Module]:
    """Subclass of ``layer_class`` whose layers have the sizes of their own entry in ``per_layer_config``.

    vLLM's layers take the configuration as ``config`` or inside ``vllm_config``, and their index in ``prefix``.

    Args:
        layer_class: decoder layer class of vLLM.
        vllm_config: configuration of the engine.
        overrides: values set in the configuration of every layer.
    """
    signature = inspect.signature(layer_class.__init__)

    class Layer(layer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            arguments = signature.bind(self, *args, **kwargs).arguments
            index = extract_layer_index(arguments["prefix"])
            config = copy.copy(vllm_config.model_config.hf_text_config.per_layer_config[index])
            for name, value in overrides.items():
                setattr(config, name, value)
            if "config" in signature.parameters:
                arguments["config"] = config
            else:
                arguments["vllm_config"] = with_text_config(vllm_config, config)
            del arguments["self"]
            super().__init__(**arguments)

    Layer.__name__ = Layer.__qualname__ = f"Slim{layer_class.__name__}"
    return Layer


@contextmanager
def substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Attribute ``name`` of ``owner``, a module or class, is ``value`` within the block.

    Most of vLLM's models name the class of their layers in the code of their constructor.
    """
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class NoRotaryEmbedding(nn.Module):
    """Leaves queries and keys as they are."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


class SmolLM3Attention(LlamaAttention):
    """LLaMA's attention, without rotary embedding where ``no_rope_layers`` is 0."""

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        self._index = extract_layer_index(prefix)
        super().__init__(*args, prefix=prefix, **kwargs)

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        if config.no_rope_layers[self._index]:
            super()._init_rotary_emb(config, quant_config)
        else:
            self.rotary_emb = NoRotaryEmbedding()
