"""Export of LLaMA-like checkpoints, also with per-layer shapes, to GGUF for llama.cpp."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
    quants,
    size_label,
)
from torch import Tensor
from tqdm import tqdm

from slim_utils.common.errors import UserError
from slim_utils.export.gguf_tokenizer import Vocabulary, write_vocabulary
from slim_utils.families import EXPORTED_FAMILIES, FAMILIES, LayerShape, layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Types that the gguf package can write; llama.cpp's llama-quantize makes others from an f16 file.
OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# Block size of the quantised types.
BLOCK_SIZE = 32
ROPE_TYPES = ("default", "linear", "llama3")


def check_exportable(config: PreTrainedConfig, outtype: str) -> None:
    """Check that llama.cpp supports the model, before its weights are read.

    Raises:
        UserError: naming the unsupported setting.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.base_type not in EXPORTED_FAMILIES:
        supported = ", ".join(EXPORTED_FAMILIES)
        raise UserError(f"export of model type '{config.model_type}' is not supported; supported: {supported}")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        supported = ", ".join(ROPE_TYPES)
        raise UserError(f"export of rotary embeddings '{rope_type}' is not supported; supported: {supported}")
    if config.rope_parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError("export of partial rotary embeddings (partial_rotary_factor) is not supported")
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"export of hidden_act '{config.hidden_act}' is not supported; llama.cpp's LLaMA only has silu")
    if outtype.startswith("q"):
        widths = {shape.num_columns for shape in layer_shapes(config)}
        widths |= {shape.num_heads * shape.head_dim for shape in layer_shapes(config)} | {config.hidden_size}
        unaligned = sorted(width for width in widths if width % BLOCK_SIZE)
        if unaligned:
            raise UserError(
                f"--outtype {outtype} packs blocks of {BLOCK_SIZE} weights, which does not divide rows of "
                f"{', '.join(map(str, unaligned[:5]))}; prune with --multiple_of {BLOCK_SIZE}, or use --outtype f16"
            )


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    path: Path,
    outtype: str,
    name: str,
) -> None:
    """Write ``model`` to the GGUF file ``path``.

    The architecture is ``llama`` for uniform layers, and ``deci``, which has per-layer heads and FFN widths, otherwise.

    Args:
        model: model of one of ``EXPORTED_FAMILIES``.
        tokenizer: tokenizer of the model.
        vocabulary: vocabulary of the tokenizer.
        path: output file.
        outtype: type of the matrices, a key of ``OUTTYPES``; vectors are fp32.
        name: name of the model.

    Raises:
        UserError: if llama.cpp has no counterpart of a tensor.
    """
    config, shapes = model.config, layer_shapes(model.config)
    arch = MODEL_ARCH.LLAMA if len(set(shapes)) == 1 else MODEL_ARCH.DECI
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    try:
        write_shapes(writer, config, shapes)
        write_vocabulary(writer, vocabulary, tokenizer)
        targets = get_tensor_name_map(arch, len(shapes))
        tensors = list(exported_tensors(model, shapes))
        for source, tensor in tqdm(tensors, desc="export", unit="tensor", disable=None):
            target = targets.get_name(source, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UserError(f"{source}: llama.cpp has no such tensor in a {MODEL_ARCH_NAMES[arch]}")
            add_tensor(writer, target, tensor, OUTTYPES[outtype][0])
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        write_general(writer, name, OUTTYPES[outtype][1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def write_general(writer: GGUFWriter, name: str, file_type: LlamaFileType) -> None:
    """Write the general metadata; the size label counts the tensors added to ``writer`` so far."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def context_length(config: PreTrainedConfig) -> int:
    """Context length: the model's positions or, if shorter, its sliding window, within which attention is full."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return config.max_position_embeddings
    logger.warning(
        "llama.cpp's LLaMA has no sliding window: the context length is set to the window, %d tokens instead of %d; "
        "results on longer contexts would differ from those of Transformers",
        window,
        config.max_position_embeddings,
    )
    return window


def write_shapes(writer: GGUFWriter, config: PreTrainedConfig, shapes: list[LayerShape]) -> None:
    """Write sizes and rotary embeddings; heads and widths are lists for per-layer shapes."""
    per_layer = len(set(shapes)) > 1
    heads, kv_heads, columns = (
        [getattr(shape, name) for shape in shapes] for name in ("num_heads", "num_kv_heads", "num_columns")
    )
    head_dim = shapes[0].head_dim
    writer.add_block_count(len(shapes))
    writer.add_context_length(context_length(config))
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if per_layer else kv_heads[0])
    writer.add_feed_forward_length(columns if per_layer else columns[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def exported_tensors(model: PreTrainedModel, shapes: list[LayerShape]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors to export: query and key rows in llama.cpp's order, without a tied head."""
    embedding = model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        # Compares the weights, not the flag: a checkpoint may store an untied head and claim that it is tied.
        if name == "lm_head.weight" and torch.equal(tensor, embedding):
            continue
        for part, count in (("q_proj", "num_heads"), ("k_proj", "num_kv_heads")):
            if f".self_attn.{part}." in name:
                shape = shapes[int(name.split(".layers.")[1].split(".")[0])]
                tensor = interleave_halves(tensor, getattr(shape, count))
        yield name, tensor


def interleave_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from rotary halves (Transformers) to interleaved pairs (llama.cpp)."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    """Add ``tensor`` to the file: a matrix as ``kind``, a vector as fp32."""
    array = tensor.detach().to(torch.float32).cpu().contiguous().numpy()
    if array.ndim == 1:
        kind = GGMLQuantizationType.F32
    writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)


def rope_factors(config: PreTrainedConfig) -> numpy.ndarray | None:
    """Divisors (head_dim / 2,) of the rotary frequencies of LLaMA 3, fp32; ``None`` for other rotary types."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = layer_shapes(config)[0].head_dim
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / head_dim)
        smooth = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return numpy.array(factors, dtype=numpy.float32)
