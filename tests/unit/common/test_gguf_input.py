"""GGUF files as the model: what transformers does not read, and mixtures of experts."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slim_utils.common.errors import UserError
from slim_utils.common.gguf_input import READ_TYPES
from slim_utils.common.loading import load_config, load_model
from tests.gguf_files import byte_level, export
from tests.tiny_models import make_tiny

SLIDING, FULL = "sliding_attention", "full_attention"
LOCAL_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
# Tiny models of every family that can be exported and read again, beside what is set in `exported`.
READ_FAMILIES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {},
    "gemma2": {"layer_types": [SLIDING, FULL] * 2},
    "gemma3_text": {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "num_key_value_heads": 3},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {"mlp_only_layers": []},
}


@pytest.fixture(scope="module")
def gguf_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level("llama-bpe")


def exported(
    folder: Path, tokenizer: PreTrainedTokenizerFast, variant: str, outtype: str = "f32", **overrides: Any
) -> PreTrainedModel:
    """A tiny model, which ``folder`` gets as ``model.gguf``."""
    # With room for the token that the library adds to the tokenizer of a Qwen.
    model = make_tiny(variant, vocab_size=len(tokenizer) + 2, **overrides)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    export(folder / "dense", "--outtype", outtype)
    return model


def rewritten(folder: Path, renamed: dict[str, str] | None = None, **changes: Any) -> Path:
    """A copy of ``model.gguf`` with other keys under ``attention`` (``None``: without the key) and names of tensors."""
    reader = GGUFReader(folder / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / "rewritten.gguf", architecture)
    replaced = {f"{architecture}.attention.{key}": value for key, value in changes.items()}
    for key, field in reader.fields.items():
        if key not in replaced and not key.startswith(("GGUF.", "general.architecture")):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for key, value in replaced.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor((renamed or {}).get(tensor.name, tensor.name), numpy.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "rewritten.gguf"


def test_every_type_that_is_read_is_tested():
    assert {"llama" if variant == "gqa" else variant for variant in READ_FAMILIES} == set(READ_TYPES)


@torch.no_grad()
def assert_same_logits(file: Path, expected: PreTrainedModel, samples: torch.Tensor) -> PreTrainedModel:
    model = load_model(str(file), "auto", False)
    assert torch.allclose(model(samples).logits, expected(samples).logits, atol=1e-4)
    return model


@pytest.mark.parametrize("variant", READ_FAMILIES)
def test_load_model_of_a_gguf_file_of_every_family_equals_the_exported_checkpoint(
    variant, gguf_tokenizer, samples, tmp_path
):
    settings = {"head_dim": 8, "hidden_size": 32, "num_attention_heads": 4} | READ_FAMILIES[variant]
    if variant == "gemma3_text":
        settings |= {"num_attention_heads": 6, "hidden_size": 48}
    if variant == "qwen3":
        settings |= {"layer_types": [FULL] * 4, "use_sliding_window": False, "sliding_window": None, "head_dim": 16}
    expected = exported(tmp_path, gguf_tokenizer, variant, **settings)
    model = assert_same_logits(tmp_path / "model.gguf", expected, samples)
    assert type(model) is type(expected)
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(tmp_path / "again", expected, samples)


@pytest.mark.parametrize(
    ("variant", "layer_types"),
    [
        ("gemma2", [SLIDING] * 4),
        ("gemma2", [SLIDING, SLIDING, FULL, SLIDING]),
        ("gemma3_text", [SLIDING, FULL] * 2),
        ("gemma3_text", [SLIDING] * 4),
    ],
)
def test_load_model_of_a_gguf_file_of_gemma_has_its_windows(variant, layer_types, gguf_tokenizer, samples, tmp_path):
    local = {"rope_parameters": LOCAL_ROPE} if variant == "gemma3_text" else {}
    expected = exported(tmp_path, gguf_tokenizer, variant, layer_types=layer_types, sliding_window=5, **local)
    assert_same_logits(tmp_path / "model.gguf", expected, samples)
    listed = rewritten(tmp_path, sliding_window_pattern=[kind == SLIDING for kind in layer_types])
    assert_same_logits(listed, expected, samples)
    with pytest.raises(UserError, match="sliding_window_pattern of 2 layers, but it has 4; use the checkpoint"):
        load_config(str(rewritten(tmp_path, sliding_window_pattern=[True, False])), False)


@pytest.mark.parametrize(("variant", "period"), [("gemma2", 2), ("gemma3_text", 6)])
def test_load_config_of_a_gguf_file_of_gemma_without_a_pattern_has_llama_cpps(
    variant, period, gguf_tokenizer, tmp_path
):
    layer_types = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]
    exported(tmp_path, gguf_tokenizer, variant, layer_types=layer_types, num_hidden_layers=7)
    config = load_config(str(rewritten(tmp_path, sliding_window_pattern=None)), False)
    assert config.layer_types == [FULL if index % period == period - 1 else SLIDING for index in range(7)]


def test_load_model_of_a_gguf_file_of_gemma3_without_a_window_has_full_attention(gguf_tokenizer, samples, tmp_path):
    settings = {"layer_types": [FULL] * 4, "rope_parameters": LOCAL_ROPE}
    expected = exported(tmp_path, gguf_tokenizer, "gemma3_text", **settings)
    for window in (None, 0):
        model = assert_same_logits(rewritten(tmp_path, sliding_window=window), expected, samples)
        assert SLIDING not in model.config.layer_types


@pytest.mark.parametrize("settings", [{"sliding_window": 8}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_load_model_of_a_gguf_file_of_phi3_has_its_window_and_rotary_dimensions(
    settings, gguf_tokenizer, samples, tmp_path
):
    rope = {"rope_type": "default", "rope_theta": 1e4} | settings.get("rope_parameters", {})
    expected = exported(tmp_path, gguf_tokenizer, "phi3", **settings | {"rope_parameters": rope})
    assert_same_logits(tmp_path / "model.gguf", expected, samples)


def test_load_config_of_a_gguf_file_of_phi3_older_than_the_key_of_its_window_is_refused(gguf_tokenizer, tmp_path):
    exported(tmp_path, gguf_tokenizer, "phi3", num_hidden_layers=32, max_position_embeddings=4096)
    with pytest.raises(UserError, match="does not say the sliding window of its Phi-3; use the checkpoint"):
        load_config(str(tmp_path / "model.gguf"), False)
    assert load_config(str(rewritten(tmp_path, sliding_window=0)), False).sliding_window is None
    assert load_config(str(rewritten(tmp_path, sliding_window=2047)), False).sliding_window == 2047


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_load_model_of_a_quantised_gguf_file_dequantises_experts(variant, gguf_tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
    moe = {"moe_intermediate_size": 32, "mlp_only_layers": []} if variant == "qwen3_moe" else {}
    expected = exported(tmp_path, gguf_tokenizer, variant, "q8_0", **sizes, **moe).state_dict()
    weights = load_model(str(tmp_path / "model.gguf"), "auto", False).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        # Half a step of 127 on each side of 0.
        assert (weights[name] - weight).abs().max() <= weight.abs().max() / 250, name


def test_load_model_of_a_gguf_file_of_mixtral_with_other_tensors_is_refused(gguf_tokenizer, tmp_path):
    exported(tmp_path, gguf_tokenizer, "mixtral")
    # As in the first files of it, whose experts are single maps.
    file = rewritten(tmp_path, {"blk.2.ffn_up_exps.weight": "blk.2.ffn_up.0.weight"})
    with pytest.raises(UserError, match=r"lacks blk\.2\.ffn_up_exps\.weight; use the checkpoint"):
        load_model(str(file), "auto", False)
