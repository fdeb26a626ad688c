"""Decoder layers of OLMo 2 and 3, which vLLM has in its Transformers backend alone, on those of its LLaMA."""

import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs


class NormOverHeads(nn.Module):
    """RMS norm over all heads of a layer, which devices share evenly or have copies of.

    Args:
        num_heads: heads of the layer.
        head_dim: size of a head.
        eps: added to the mean square.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.devices, self.eps = get_tensor_model_parallel_world_size(), eps
        self.parts = min(self.devices, num_heads)
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim // self.parts))
        set_weight_attrs(self.weight, {"weight_loader": self.load_part})

    def load_part(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        """Load this device's part of the weight of all heads."""
        part = get_tensor_model_parallel_rank() * self.parts // self.devices
        parameter.data.copy_(loaded.chunk(self.parts)[part])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Normed ``rows`` (tokens, heads of this device * head_dim)."""
        values = rows.float()
        mean_square = values.square().mean(-1, keepdim=True)
        if self.devices > 1:
            # Parts have the same size, and each the same number of copies.
            mean_square = tensor_model_parallel_all_reduce(mean_square) / self.devices
        return (self.weight * (values * torch.rsqrt(mean_square + self.eps))).to(rows.dtype)


class OlmoAttention(LlamaAttention):
    """LLaMA's attention, with norms over all queries and all keys; OLMo 3 rotates differently within windows."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        if "full_attention" in config.rope_parameters:
            rope = config.rope_parameters[config.layer_types[extract_layer_index(prefix)]]
            config = copy.copy(config)
            config.rope_parameters = rope
        super().__init__(config, *args, prefix=prefix, **kwargs)
        self.q_norm = NormOverHeads(self.total_num_heads, self.head_dim, config.rms_norm_eps)
        self.k_norm = NormOverHeads(self.total_num_kv_heads, self.head_dim, config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output (tokens, hidden) of the attention."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class OlmoDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with its norms behind the attention and the FFN."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=OlmoAttention)
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(self.hidden_size, eps=self.post_attention_layernorm.variance_epsilon)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds to the residual stream, and the stream before it, both (tokens, hidden)."""
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.post_attention_layernorm(self.self_attn(positions, stream))
        return self.post_feedforward_layernorm(self.mlp(stream)), stream
