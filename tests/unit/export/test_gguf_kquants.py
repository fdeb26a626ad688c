"""K-quants: types of the matrices, and environments without a quantiser."""

import pytest
from gguf import GGMLQuantizationType

from slim_utils.common.errors import UserError
from slim_utils.export import gguf_kquants
from slim_utils.export.gguf import check_exportable
from slim_utils.export.gguf_kquants import matrix_type
from tests.tiny_models import make_tiny


def test_matrix_type_of_k_quants_has_more_bits_for_some_matrices():
    def types(base, name, width=256, tied=False):
        return [matrix_type(base, name.format(layer), width, 16, tied).name for layer in range(8)]

    q4, q5 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K
    expected = ["Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K"]
    assert types(q4, "blk.{}.ffn_down.weight") == types(q4, "blk.{}.attn_v.weight") == expected
    assert set(types(q4, "blk.{}.attn_q.weight")) == {"Q4_K"} and set(types(q5, "blk.{}.attn_qkv.weight")) == {"Q6_K"}
    assert types(q4, "output.weight")[0] == types(q4, "token_embd.weight", tied=True)[0] == "Q6_K"
    assert types(q4, "token_embd.weight")[0] == "Q4_K"
    assert types(q4, "blk.{}.attn_q.weight", 288)[0] == "Q5_0" and types(q4, "output.weight", 288)[0] == "Q8_0"


def test_check_exportable_of_k_quants_without_llama_cpp_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gguf_kquants, "ENGINE", "no_such_package")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    with pytest.raises(
        UserError, match=r"--outtype q4_k_m needs llama.cpp's quantiser: .* pip install '\.\[llamacpp\]'"
    ):
        check_exportable(make_tiny("gqa", **sizes).config, "q4_k_m")
