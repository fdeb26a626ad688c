"""Weights of a mixture of experts in a GGUF file.

llama.cpp has the gate and up maps of all experts as two tensors where Transformers has one, and a Mixtral is a LLaMA to
it, for which transformers reads no experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from slim_utils.common.gguf_header import GgufHeader, read_header, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import ReaderTensor
    from transformers import PreTrainedConfig

# Architectures that are read here.
_ARCHITECTURES = ("llama", "qwen3moe")
# Those of them whose rows of a rotary pair are adjacent, where those of Transformers are half a head apart.
_INTERLEAVED = ("llama",)
# The parts of fused maps.
FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Maps whose rows are rotated, and the number of their heads in the configuration.
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def reads_experts(header: GgufHeader) -> bool:
    """Whether :func:`expert_weights` reads the model."""
    return header.has_experts and header.architecture in _ARCHITECTURES


def expert_weights(model_path: str, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a mixture of experts, by the names of Transformers.

    Args:
        model_path: the file.
        config: its configuration.
        dtype: data type of the weights.

    Raises:
        UserError: if the file lacks one of them.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    stored = {tensor.name: tensor for tensor in GGUFReader(model_path).tensors}
    architecture = read_header(model_path).architecture
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
    targets = get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    weights = {}
    for name in names:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = []
        for part in _stored_parts(name):
            target = targets.get_name(part, try_suffixes=(".weight", ".bias"))
            if target not in stored:
                raise refusal(model_path, f"lacks {target or part}")
            parts.append(_dequantised(stored[target], dtype))
        rotated = next((key for part, key in _ROTATED.items() if f".self_attn.{part}." in name), None)
        if rotated and architecture in _INTERLEAVED:
            parts = [separate_halves(rows, getattr(config, rotated)) for rows in parts]
        weights[name] = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
    return weights


def _stored_parts(name: str) -> Iterator[str]:
    """Names of the tensors in the file that make up a weight; those of experts are weights of a module there."""
    if ".experts." not in name:
        yield name
        return
    fused = name.rsplit(".", 1)[1]
    for part in FUSED_PARTS.get(fused, (fused,)):
        yield f"{name.removesuffix(fused)}{part}.weight"


def _dequantised(tensor: ReaderTensor, dtype: torch.dtype) -> torch.Tensor:
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)


def separate_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from interleaved pairs (llama.cpp) to rotary halves (Transformers)."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
