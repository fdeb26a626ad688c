"""A LLaMA of wide layers, for tests that measure memory."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.tiny_models import VOCAB


def save_wide_llama(path: Path, tokenizer: PreTrainedTokenizerBase, num_layers: int) -> LlamaForCausalLM:
    """Save a random model, nearly all of it in layers of 28 MiB, whose Hessians are small in comparison."""
    sizes = {"hidden_size": 2048, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=num_layers, head_dim=64, max_position_embeddings=64, **sizes
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    values = torch.randn(2048 * 512, generator=torch.Generator().manual_seed(0)) * 0.02
    for index, parameter in enumerate(model.parameters()):
        # Random numbers are slow to draw; the same ones are reused, rolled.
        rolled = values[: parameter.numel()].roll(index).view(parameter.shape)
        parameter.data = rolled if parameter.dim() > 1 else torch.ones(parameter.shape)
    model.save_pretrained(path, max_shard_size="200MB")
    tokenizer.save_pretrained(path)
    return model
