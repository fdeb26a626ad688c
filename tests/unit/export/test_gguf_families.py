"""GGUF files of every exported family read back: architecture, keys, and tensors that differ from the model's."""

import functools
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from slim_utils.export.gguf import export_gguf
from slim_utils.export.gguf_tokenizer import Vocabulary, read_vocabulary
from tests.gguf_files import byte_level, save_pruned, values
from tests.tiny_models import make_tiny

ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_parameters": ROPE, "original_max_position_embeddings": 16}
FULL = {"layer_types": None, "use_sliding_window": False, "sliding_window": None}
EVERY_FOURTH = {"no_rope_layers": [1, 1, 1, 0]}


@functools.cache
def vocabulary() -> tuple[object, Vocabulary]:
    tokenizer = byte_level("gpt-2")
    return tokenizer, read_vocabulary(tokenizer, 610, "here")


def exported(path: Path, model) -> GGUFReader:
    """What the export of ``model`` in fp32 wrote."""
    export_gguf(model, *vocabulary(), path, "f32", "tiny")
    return GGUFReader(path)


def weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("model_type", "overrides", "architecture", "expected"),
    [
        ("qwen2", {}, "qwen2", {"rope.freq_base": 10000.0}),
        ("qwen2", {"head_dim": 8}, "llama", {"attention.key_length": 8}),
        ("qwen3", FULL, "qwen3", {"attention.head_count_kv": 2}),
        ("gemma", {}, "gemma", {}),
        (
            "gemma2",
            {},
            "gemma2",
            {
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "attention.sliding_window": 8,
                "attention.sliding_window_pattern": 2,
                "context_length": 64,
            },
        ),
        (
            "gemma3_text",
            {},
            "gemma3",
            {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 8},
        ),
        ("phi3", {}, "phi3", {"rope.dimension_count": 4}),
        ("phi3", LONGROPE, "phi3", {"rope.scaling.original_context_length": 16}),
        ("phi3", {"head_dim": 8}, "llama", {}),
        (
            "granite",
            {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
            "granite",
            {"attention.scale": 0.3, "residual_scale": 0.7, "logit_scale": 2.0, "embedding_scale": 3.0},
        ),
        ("olmo2", {}, "olmo2", {}),
        ("olmo3", {}, "olmo2", {"attention.sliding_window_pattern": 2}),
        ("smollm3", EVERY_FOURTH, "smollm3", {}),
        ("seed_oss", {}, "seed_oss", {}),
        ("ernie4_5", {"use_bias": False}, "ernie4_5", {}),
        ("arcee", {"mlp_bias": False}, "arcee", {}),
        ("mixtral", {}, "llama", {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 40}),
        ("qwen3_moe", {"mlp_only_layers": []}, "qwen3moe", {"expert_feed_forward_length": 20}),
    ],
)
def test_export_of_a_family_has_its_architecture_and_keys(tmp_path, model_type, overrides, architecture, expected):
    model = make_tiny(model_type, vocab_size=610, **overrides)
    reader = exported(tmp_path / "model.gguf", model)
    keys, tensors = values(reader), weights(reader)
    assert keys["general.architecture"] == architecture
    got = {key: keys[f"{architecture}.{key}"] for key in expected}
    assert got == {key: pytest.approx(value) for key, value in expected.items()}
    # Tied heads are the embedding, except for OLMo 2, whose loader wants both.
    tied = torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert ("output.weight" in tensors) == (not tied)
    assert tensors["token_embd.weight"].shape == (610, 24)


def test_export_of_gemma_adds_one_to_norms_and_scales_queries(tmp_path):
    model = make_tiny("gemma3_text", vocab_size=610, query_pre_attn_scalar=16)
    tensors, layer = weights(exported(tmp_path / "model.gguf", model)), model.model.layers[1]
    assert torch.allclose(tensors["blk.1.attn_norm.weight"], layer.input_layernorm.weight + 1)
    assert torch.allclose(tensors["blk.1.attn_k_norm.weight"], layer.self_attn.k_norm.weight + 1)
    # llama.cpp divides by the root of the head size, 4.
    assert torch.allclose(tensors["blk.1.attn_q_norm.weight"], (layer.self_attn.q_norm.weight + 1) / 2)
    assert torch.equal(tensors["blk.1.attn_q.weight"], layer.self_attn.q_proj.weight)


def test_export_of_phi3_splits_its_maps_for_llama(tmp_path):
    fused = make_tiny("phi3", vocab_size=610, **LONGROPE)
    tensors = weights(exported(tmp_path / "phi3.gguf", fused))
    assert torch.equal(tensors["blk.0.attn_qkv.weight"], fused.model.layers[0].self_attn.qkv_proj.weight)
    assert tensors["rope_factors_long.weight"].tolist() == [2.0, 3.0]
    wide = make_tiny("phi3", vocab_size=610, head_dim=8)
    tensors, layer = weights(exported(tmp_path / "llama.gguf", wide)), wide.model.layers[0]
    assert tensors["blk.0.attn_q.weight"].shape == (48, 24) and tensors["blk.0.attn_k.weight"].shape == (16, 24)
    assert torch.equal(tensors["blk.0.attn_v.weight"], layer.self_attn.qkv_proj.weight[64:])
    assert torch.equal(tensors["blk.0.ffn_up.weight"], layer.mlp.gate_up_proj.weight[40:])


def test_export_of_experts_splits_gate_and_up(tmp_path):
    model = make_tiny("mixtral", vocab_size=610)
    tensors, experts = weights(exported(tmp_path / "model.gguf", model)), model.model.layers[1].mlp.experts
    assert torch.equal(tensors["blk.1.ffn_gate_exps.weight"], experts.gate_up_proj[:, :40])
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], experts.gate_up_proj[:, 40:])
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], experts.down_proj)


def test_export_of_pruned_phi3_has_per_layer_shapes(tmp_path):
    model = save_pruned(tmp_path / "model", vocabulary()[0], "phi3", False, vocab_size=610)
    keys = values(exported(tmp_path / "model.gguf", model))
    assert keys["general.architecture"] == "deci" and keys["deci.feed_forward_length"] == [40, 36, 32, 28]


def test_export_reorders_rotary_rows_of_interleaved_architectures_alone(tmp_path):
    for model_type, overrides, same in (("qwen3", FULL, True), ("granite", {}, False)):
        model = make_tiny(model_type, vocab_size=610, **overrides)
        queries = weights(exported(tmp_path / "model.gguf", model))["blk.0.attn_q.weight"]
        assert torch.equal(queries, model.model.layers[0].self_attn.q_proj.weight) == same


def test_export_of_tied_olmo2_writes_the_head(tmp_path):
    model = make_tiny("olmo2", vocab_size=610, tie_word_embeddings=True)
    assert "output.weight" in weights(exported(tmp_path / "model.gguf", model))
