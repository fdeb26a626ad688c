"""A GGUF file as the model: transformers dequantises it; what it would misread is refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from math import isclose, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from models.families import FAMILIES, ROWS
from slim_utils.common.bpe_rules import pre_tokenizer
from slim_utils.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GGUF_SUFFIX = ".gguf"
# Frequencies of scaled rotary embeddings, which transformers does not read.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ADVICE = "use the checkpoint that the file was made from"
# Numbers of layers with which llama.cpp scales the attention of a Gemma by the hidden size per head, not by the head.
DEEP_GEMMAS = {"gemma2": 46, "gemma3": 62}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Types of matrices that hold values, not blocks.
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        tensor_type: type of most of the weights, such as ``Q8_0``.
        num_weights: number of weights, without rotary frequencies.
        parts: number of files that the model is split into.
        rope_scaling: what scales the rotary embeddings, if anything does.
        rope_theta: base of the rotary embeddings, if the file names one.
        softcaps: soft caps of the logits, by their key in the configuration.
    """

    architecture: str
    tensor_type: str
    num_weights: int
    parts: int
    rope_scaling: str
    rope_theta: float | None
    softcaps: dict[str, float]

    @property
    def description(self) -> str:
        """The format in words."""
        blocks = "" if self.tensor_type in _FLOATS else ", dequantised"
        return f"GGUF file ({self.tensor_type}){blocks}"


def is_gguf(model_path: str) -> bool:
    """Whether ``model_path`` names a GGUF file."""
    return Path(model_path).suffix.lower() == GGUF_SUFFIX


def gguf_arguments(model_path: str) -> tuple[str, dict[str, str]]:
    """Arguments of ``from_pretrained`` for ``model_path``: folder or hub name, and ``gguf_file`` for a GGUF file."""
    if not is_gguf(model_path):
        return model_path, {}
    path = Path(model_path).absolute()
    return str(path.parent), {"gguf_file": path.name}


def read_header(model_path: str) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        UserError: if the file or the package ``gguf`` is missing, or the file is damaged.
    """
    path = Path(model_path)
    if not path.is_file():
        raise UserError(f"model {model_path}: no such file")
    state = path.stat()
    return _read_header(str(path.absolute()), state.st_size, state.st_mtime_ns)


@cache
def _read_header(path: str, size: int, mtime: int) -> GgufHeader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"model {path}: GGUF files need the package gguf; pip install gguf") from None
    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("tokenizer.")}
        architecture = str(fields["general.architecture"])
        sizes: dict[str, int] = {}
        for tensor in reader.tensors:
            if tensor.name not in _ROPE_TENSORS:
                kind = tensor.tensor_type.name
                sizes[kind] = sizes.get(kind, 0) + prod(map(int, tensor.shape))
        kind = max(sizes, key=lambda name: sizes[name])
    except Exception as error:
        # Whatever the reader meets in bytes that are not a GGUF file.
        raise UserError(f"model {path}: damaged, incomplete ({size:,} bytes) or not a GGUF file") from error
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    tensors = [tensor.name for tensor in reader.tensors if tensor.name in _ROPE_TENSORS]
    rope_scaling = tensors[0] if tensors else "" if scaling == "none" else f"rope.scaling.type {scaling}"
    softcaps = {key: fields[f"{architecture}.{key}"] for key in _SOFTCAPS if f"{architecture}.{key}" in fields}
    return GgufHeader(
        architecture,
        kind,
        sum(sizes.values()),
        int(fields.get("split.count") or 1),
        rope_scaling,
        fields.get(f"{architecture}.rope.freq_base"),
        softcaps,
    )


def check_architecture(model_path: str) -> None:
    """Check, before transformers reads the file, that it is whole and that nothing in it is ignored.

    Raises:
        UserError: if it is one of several parts, or its rotary embeddings are scaled.
    """
    header = read_header(model_path)
    if header.parts > 1:
        raise UserError(f"model {model_path}: one of {header.parts} parts; join them by llama-gguf-split --merge")
    if header.architecture == "deci":
        raise UserError(f"model {model_path}: transformers does not read per-layer shapes from GGUF; {_ADVICE}")
    if header.rope_scaling:
        raise UserError(
            f"model {model_path}: transformers does not read the scaling of its rotary embeddings "
            f"({header.rope_scaling}); {_ADVICE}"
        )


def complete_config(config: PreTrainedConfig, model_path: str) -> None:
    """Set what transformers does not read of Gemma's attention: its scale, which llama.cpp derives, and soft caps.

    Raises:
        UserError: if transformers reads another base of the rotary embeddings.
    """
    header = read_header(model_path)
    if header.architecture in DEEP_GEMMAS:
        deep = config.num_hidden_layers == DEEP_GEMMAS[header.architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if deep else config.head_dim
        for key, value in header.softcaps.items():
            setattr(config, key, value)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("full_attention", rope).get("rope_theta")
    if header.rope_theta and theta and not isclose(theta, header.rope_theta, rel_tol=1e-5):
        raise UserError(
            f"model {model_path}: its rotary embeddings have the base {header.rope_theta:g}, but transformers reads "
            f"{theta:g}; {_ADVICE}"
        )


def check_weights_of_gguf(model_path: str, config: PreTrainedConfig) -> None:
    """Check that the family is one of the table, and that the file has as many weights as a model of ``config``.

    Raises:
        UserError: otherwise.
    """
    if config.model_type not in FAMILIES:
        supported = ", ".join(row.base_type for row in ROWS)
        raise UserError(
            f"model {model_path}: a GGUF file of model type '{config.model_type}' is not supported; supported: "
            f"{supported}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected, stored = sum(parameter.numel() for parameter in model.parameters()), read_header(model_path).num_weights
    if expected != stored:
        raise UserError(
            f"model {model_path}: {stored:,} weights, but transformers reads a {config.model_type} of {expected:,}; "
            f"{_ADVICE}"
        )


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
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True, **arguments
    )
    if info["missing_keys"]:
        raise UserError(f"model {model_path}: lacks {min(info['missing_keys'])}; {_ADVICE}")
    # Settings of the quantiser, which would be saved too.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = model.name_or_path = model_path
    return model
