"""Export of dense and pruned checkpoints to GGUF for llama.cpp."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quants,
    size_label,
)
from torch import Tensor
from tqdm import tqdm

from slim_utils.common.errors import UserError
from slim_utils.common.gguf_experts import FUSED_PARTS
from slim_utils.export.gguf_kquants import FALLBACKS, K_BLOCK_SIZE, Quantiser, engine_quantiser, matrix_type
from slim_utils.export.gguf_metadata import rope_tensors, write_metadata
from slim_utils.export.gguf_tokenizer import Vocabulary, write_vocabulary
from slim_utils.families import LayerShape, layer_shapes
from slim_utils.gguf_families import Architecture, find_architecture, query_factor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Types of the matrices; K-quants, mixtures of types, need the quantiser of an installed llama.cpp.
OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q6_k": (GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
# Block size of the quantised types.
BLOCK_SIZE = 32
# Maps whose rows are rotated, and what a layer has of them.
ROTATED = (("q_proj", "num_heads"), ("k_proj", "num_kv_heads"))


def check_exportable(config: PreTrainedConfig, outtype: str) -> None:
    """Check that llama.cpp supports the model, before its weights are read.

    Raises:
        UserError: naming the unsupported setting; for K-quants, if there is no quantiser.
    """
    find_architecture(config)
    if outtype.startswith("q"):
        widths = {shape.ffn_width for shape in layer_shapes(config)}
        widths |= {shape.num_heads * shape.head_dim for shape in layer_shapes(config)} | {config.hidden_size}
        unaligned = sorted(width for width in widths if width % BLOCK_SIZE)
        if unaligned:
            raise UserError(
                f"--outtype {outtype} packs blocks of {BLOCK_SIZE} weights, which does not divide rows of "
                f"{', '.join(map(str, unaligned[:5]))}; prune with --multiple_of {BLOCK_SIZE}, or use --outtype f16"
            )
    find_quantiser(outtype)


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    path: Path,
    outtype: str,
    name: str,
) -> None:
    """Write ``model`` to the GGUF file ``path``.

    The architecture is the first of the family's that expresses the model; ``deci`` has per-layer heads and FFN widths.

    Args:
        model: model of one of ``GGUF_FAMILIES``.
        tokenizer: tokenizer of the model.
        vocabulary: vocabulary of the tokenizer.
        path: output file.
        outtype: type of the matrices, a key of ``OUTTYPES``; vectors are fp32.
        name: name of the model.

    Raises:
        UserError: if llama.cpp has no counterpart of a tensor.
    """
    config, shapes = model.config, layer_shapes(model.config)
    architecture = find_architecture(config)
    arch = MODEL_ARCH[architecture.name]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    try:
        write_metadata(writer, architecture, config, shapes)
        write_vocabulary(writer, vocabulary, tokenizer)
        targets = get_tensor_name_map(arch, len(shapes))
        tensors = {}
        for source, tensor in exported_tensors(model, architecture, shapes):
            target = targets.get_name(source, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UserError(f"{source}: llama.cpp has no such tensor in a {MODEL_ARCH_NAMES[arch]}")
            tensors[target] = tensor
        _add_tensors(writer, tensors, outtype, len(shapes))
        for target, factors in rope_tensors(config, shapes[0].head_dim).items():
            writer.add_tensor(target, factors)
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


def exported_tensors(
    model: PreTrainedModel, architecture: Architecture, shapes: list[LayerShape]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as llama.cpp computes with them: without a tied head, and with the norms' offset.

    Rows of queries and keys are reordered and fused maps split where the architecture needs it.
    """
    embedding = model.get_input_embeddings().weight
    factor = query_factor(architecture, model.config, shapes[0])
    for name, tensor in model.state_dict().items():
        # Compares the weights, not the flag: a checkpoint may store an untied head and claim that it is tied.
        if name == "lm_head.weight" and not architecture.output and torch.equal(tensor, embedding):
            continue
        if architecture.norm_offset and name.endswith("norm.weight"):
            tensor = tensor.to(torch.float32) + architecture.norm_offset
        if factor != 1 and f".{architecture.query_map}." in name:
            tensor = tensor.to(torch.float32) * factor
        if ".layers." not in name:
            yield name, tensor
            continue
        shape = shapes[int(name.split(".layers.")[1].split(".")[0])]
        for part, rows in _split(name, tensor, architecture, shape):
            for rotated, count in ROTATED:
                if architecture.interleaved and f".self_attn.{rotated}." in part:
                    rows = interleave_halves(rows, getattr(shape, count))
            yield part, rows


def _split(name: str, tensor: Tensor, architecture: Architecture, shape: LayerShape) -> Iterator[tuple[str, Tensor]]:
    """The parts of a fused map, unless the architecture has fused maps too; other tensors as they are.

    Maps of experts are 3-D parameters, experts first.
    """
    if tensor.ndim == 3:
        name += ".weight"
    fused = next((fused for fused in FUSED_PARTS if f".{fused}." in name), None)
    if fused is None or architecture.fused:
        yield name, tensor
        return
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    sizes = [count * shape.head_dim for count in heads] if fused == "qkv_proj" else [shape.ffn_width] * 2
    for part, rows in zip(FUSED_PARTS[fused], tensor.split(sizes, dim=tensor.ndim - 2), strict=True):
        yield name.replace(fused, part), rows


def interleave_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from rotary halves (Transformers) to interleaved pairs (llama.cpp)."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tensors(writer: GGUFWriter, tensors: dict[str, Tensor], outtype: str, num_layers: int) -> None:
    """Add ``tensors``, by their names in the file: matrices as ``outtype``, vectors as fp32."""
    quantise, tied = find_quantiser(outtype), "output.weight" not in tensors
    larger = 0
    for name, tensor in tqdm(tensors.items(), desc="export", unit="tensor", disable=None):
        kind = OUTTYPES[outtype][0]
        # The router chooses the experts: llama.cpp keeps it in fp32.
        if tensor.ndim == 1 or name.endswith(".ffn_gate_inp.weight"):
            kind = GGMLQuantizationType.F32
        elif kind in FALLBACKS:
            kind = matrix_type(kind, name, tensor.shape[-1], num_layers, tied)
            larger += tensor.shape[-1] % K_BLOCK_SIZE != 0
        array = tensor.detach().to(torch.float32).cpu().contiguous().numpy()
        writer.add_tensor(name, quantise(array, kind), raw_dtype=kind)
    if larger:
        logger.warning(
            "--outtype %s: %d of %d matrices are larger (q5_0, q5_1 or q8_0), since their rows are no multiple of %d; "
            "prune with --multiple_of %d",
            outtype,
            larger,
            sum(tensor.ndim > 1 for tensor in tensors.values()),
            K_BLOCK_SIZE,
            K_BLOCK_SIZE,
        )


def find_quantiser(outtype: str) -> Quantiser:
    """Return what packs arrays: the gguf package or, for K-quants, the library of an installed llama.cpp.

    Raises:
        UserError: for K-quants, if none is installed.
    """
    return engine_quantiser(outtype) if OUTTYPES[outtype][0] in FALLBACKS else quants.quantize
