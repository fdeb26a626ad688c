"""What the header of a GGUF file says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from slim_utils.common.errors import UserError

GGUF_SUFFIX = ".gguf"
# Frequencies of scaled rotary embeddings, which transformers does not read.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ADVICE = "use the checkpoint that the file was made from"
# Types of matrices that hold values, not blocks.
_FLOATS = ("F32", "F16", "BF16", "F64")
PADDING_KEY = "tokenizer.ggml.padding_token_id"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        tensor_type: type of most of the weights, such as ``Q8_0``.
        num_weights: number of weights, without rotary frequencies.
        rope_tensor: name of a tensor of rotary frequencies, if there is one.
        fields: keys of the file with their values, without those of the tokenizer but for its padding token.
    """

    architecture: str
    tensor_type: str
    num_weights: int
    rope_tensor: str
    fields: dict[str, Any]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture, such as ``attention.sliding_window``."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    @property
    def parts(self) -> int:
        """Number of files that the model is split into."""
        return int(self.fields.get("split.count") or 1)

    @property
    def rope_scaling(self) -> str:
        """What scales the rotary embeddings; empty if nothing does."""
        scaling = self.value("rope.scaling.type", "none")
        return self.rope_tensor or ("" if scaling == "none" else f"rope.scaling.type {scaling}")

    @property
    def has_experts(self) -> bool:
        """Whether the FFNs are mixtures of experts."""
        return bool(self.value("expert_count"))

    @property
    def description(self) -> str:
        """The format in words."""
        blocks = "" if self.tensor_type in _FLOATS else ", dequantised"
        return f"GGUF file ({self.tensor_type}){blocks}"


def refusal(model_path: str, reason: str) -> UserError:
    """The error for a file that transformers would read as another model."""
    return UserError(f"model {model_path}: {reason}; {ADVICE}")


def is_gguf(model_path: str) -> bool:
    """Whether ``model_path`` names a GGUF file."""
    return Path(model_path).suffix.lower() == GGUF_SUFFIX


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
        names = [name for name in reader.fields if not name.startswith("tokenizer.") or name == PADDING_KEY]
        fields = {name: reader.fields[name].contents() for name in names}
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
    rope_tensor = next((tensor.name for tensor in reader.tensors if tensor.name in _ROPE_TENSORS), "")
    return GgufHeader(architecture, kind, sum(sizes.values()), rope_tensor, fields)
