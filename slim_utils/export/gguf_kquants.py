"""K-quants of llama.cpp: the types of the matrices, and their quantisation by the library of an installed llama.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from slim_utils.common.errors import UserError

# Weights of a block of a K-quant.
K_BLOCK_SIZE = 256
# Types for rows that are no multiple of K_BLOCK_SIZE, as llama-quantize chooses them.
FALLBACKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
# Package whose library has the quantiser, and the extra of this project that installs it.
ENGINE, EXTRA = "xllamacpp", "llamacpp"

Quantiser = Callable[[numpy.ndarray, GGMLQuantizationType], numpy.ndarray]


def matrix_type(base: GGMLQuantizationType, name: str, width: int, num_layers: int, tied: bool) -> GGMLQuantizationType:
    """Type of a matrix in the mixtures "medium" of llama-quantize.

    The head, and the values and the FFN's outputs of about half of the layers, have more bits.

    Args:
        base: type of most matrices.
        name: name of the tensor in the file.
        width: length of its rows.
        num_layers: number of layers.
        tied: whether the embedding is the head.
    """
    parts = name.removesuffix(".weight").split(".")
    kind = base
    if parts[0] == ("token_embd" if tied else "output") or (
        parts[-1] in ("attn_v", "ffn_down", "ffn_down_exps") and _more_bits(int(parts[1]), num_layers)
    ):
        kind = GGMLQuantizationType.Q6_K
    elif parts[-1] == "attn_qkv":
        kind = GGMLQuantizationType.Q5_K if base == GGMLQuantizationType.Q4_K else GGMLQuantizationType.Q6_K
    return kind if width % K_BLOCK_SIZE == 0 else FALLBACKS[kind]


def _more_bits(index: int, num_layers: int) -> bool:
    """Whether a layer is among the first or last eighth, or every third between them."""
    eighth = num_layers // 8
    return index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2


def engine_quantiser(outtype: str) -> Quantiser:
    """Return the quantiser of an installed llama.cpp.

    Raises:
        UserError: if there is none.
    """
    spec = importlib.util.find_spec(ENGINE)
    libraries = [file for folder in (spec and spec.submodule_search_locations) or [] for file in _libraries(folder)]
    for library in libraries:
        function = getattr(ctypes.CDLL(str(library)), "ggml_quantize_chunk", None)
        if function is not None:
            return _as_quantiser(function)
    raise UserError(
        f"--outtype {outtype} needs llama.cpp's quantiser: install it with pip install '.[{EXTRA}]', or export with "
        "--outtype f16 and run llama.cpp's llama-quantize on the file"
    )


def _libraries(folder: str) -> list[Path]:
    return sorted(file for pattern in ("*.so", "*.dylib") for file in Path(folder).glob(pattern))


def _as_quantiser(function: ctypes._NamedFuncPointer) -> Quantiser:
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantise(matrix: numpy.ndarray, kind: GGMLQuantizationType) -> numpy.ndarray:
        """Bytes (…, rows, bytes per row) of an fp32 matrix, or of several."""
        if kind not in FALLBACKS:
            return quants.quantize(matrix, kind)
        width = matrix.shape[-1]
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        packed = numpy.empty((*matrix.shape[:-1], width // block_size * block_bytes), dtype=numpy.uint8)
        source = numpy.ascontiguousarray(matrix, dtype=numpy.float32)
        written = function(int(kind), source.ctypes.data, packed.ctypes.data, 0, matrix.size // width, width, None)
        assert written == packed.nbytes
        return packed

    return quantise
