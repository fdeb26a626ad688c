"""A GGUF file as the model: transformers dequantises it; what it would misread is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from slim_utils.common.bpe_rules import pre_tokenizer
from slim_utils.common.errors import UserError
from slim_utils.common.gguf_experts import expert_weights, reads_experts
from slim_utils.common.gguf_header import is_gguf, read_header, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Model types whose files are known to be read as they were written (tests/unit/common/test_gguf_input.py). Transformers
# reads more architectures, but not always every setting of theirs.
READ_TYPES = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3")


def gguf_arguments(model_path: str) -> tuple[str, dict[str, str]]:
    """Arguments of ``from_pretrained`` for ``model_path``: folder or hub name, and ``gguf_file`` for a GGUF file."""
    if not is_gguf(model_path):
        return model_path, {}
    path = Path(model_path).absolute()
    return str(path.parent), {"gguf_file": path.name}


def check_architecture(model_path: str) -> None:
    """Check, before transformers reads the file, that it is whole and that nothing in it is ignored.

    Raises:
        UserError: if it is one of several parts, or its rotary embeddings are scaled.
    """
    header = read_header(model_path)
    if header.parts > 1:
        raise UserError(f"model {model_path}: one of {header.parts} parts; join them by llama-gguf-split --merge")
    if header.architecture == "deci":
        raise refusal(model_path, "transformers does not read per-layer shapes from GGUF")
    if header.rope_scaling:
        reason = f"transformers does not read the scaling of its rotary embeddings ({header.rope_scaling})"
        raise refusal(model_path, reason)


def check_type_of_gguf(config: PreTrainedConfig, model_path: str) -> None:
    """Check that the model type is one of ``READ_TYPES``.

    Raises:
        UserError: otherwise.
    """
    if config.model_type not in READ_TYPES:
        supported = ", ".join(READ_TYPES)
        reason = f"a GGUF file of model type '{config.model_type}' is not supported (supported: {supported})"
        raise refusal(model_path, reason)


def check_weights_of_gguf(model_path: str, config: PreTrainedConfig) -> None:
    """Check that the file has as many weights as a model of ``config``.

    Raises:
        UserError: otherwise.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected, stored = sum(parameter.numel() for parameter in model.parameters()), read_header(model_path).num_weights
    if expected != stored:
        reason = f"{stored:,} weights, but transformers reads a {config.model_type} of {expected:,}"
        raise refusal(model_path, reason)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, model_path: str) -> None:
    """Apply what transformers does not read of the tokenizer in a GGUF file.

    These are control and user-defined tokens, which would be split like other text, and the rule by which a byte-level
    BPE splits a text into words; a rule that is not known is logged.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken

    fields = GGUFReader(model_path).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    special = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    marked = [(token, special[kind]) for token, kind in zip(tokens, types, strict=True) if kind in special]
    tokenizer.add_tokens([AddedToken(token, special=control, normalized=False) for token, control in marked])
    if fields["tokenizer.ggml.model"].contents() != "gpt2":
        return
    name = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else ""
    rule = pre_tokenizer(name)
    if rule is None:
        logger.warning(
            "model %s: words are split as in transformers, not by the rule '%s' of the file", model_path, name
        )
    else:
        tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.model.ignore_merges = rule


def load_gguf(model_path: str, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """The dequantised model of a GGUF file; fp32 for ``auto``.

    Args:
        model_path: the file.
        config: its configuration.
        dtype: value of ``DTYPES``.
    """
    folder, arguments = gguf_arguments(model_path)
    dtype = torch.float32 if dtype == "auto" else dtype
    options = {"config": config, "dtype": dtype, "output_loading_info": True}
    if reads_experts(read_header(model_path)):
        weights = expert_weights(model_path, config, dtype)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = model_class.from_pretrained(None, state_dict=weights, **options)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options, **arguments)
    if info["missing_keys"]:
        raise refusal(model_path, f"lacks {min(info['missing_keys'])}")
    # Settings of the quantiser, which would be saved too.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = model.name_or_path = model_path
    return model
