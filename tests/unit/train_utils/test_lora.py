"""Targets of LoRA adapters, and fused models against base plus adapters."""

import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.tiny_models import ALL_TINY, TINY_FAMILIES, make_tiny
from train_utils.finetune_args import ModelArguments
from train_utils.lora import add_lora, check_lora_targets, fuse_lora, lora_targets

ORIGINAL_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,down_proj,up_proj"


def adapted_maps(model: nn.Module) -> set[str]:
    """Names, without prefix, of the modules that have an adapter."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def block_maps(model: nn.Module) -> set[str]:
    """Names, without prefix, of the linear modules of the decoder layers; in MoE models, of the attention."""
    layers = find_family(model.config).decoder_layers(model)
    named = layers.named_modules()
    maps = {name.rpartition(".")[2] for name, module in named if isinstance(module, (nn.Linear, Conv1D))}
    return maps - {"gate_proj", "up_proj", "down_proj"} if "experts" in str(layers) else maps


@pytest.mark.parametrize("name", ALL_TINY)
def test_add_lora_by_default_adapts_every_linear_module_of_the_blocks(name):
    model = make_tiny(name)
    expected = block_maps(model)
    assert adapted_maps(add_lora(model, ModelArguments())) == expected
    assert adapted_maps(add_lora(make_tiny(name), ModelArguments(peft_target_modules="all-linear"))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("granitemoehybrid", {"self_attn": 8, "shared_mlp": 8}),
        ("jamba", {"self_attn": 8}),
        ("jamba without experts", {"self_attn": 8, "feed_forward": 12}),
        # In layers of a single block, which may be a shared expert's too.
        ("nemotron_h", {"mixer": 4 + 2, "mixer.shared_experts": 2}),
        ("nemotron_h without experts", {"mixer": 4 + 2 * 2}),
    ],
)
def test_add_lora_of_a_hybrid_adapts_attention_and_ffns_without_experts(name, expected):
    layers = find_family(make_tiny(name).config).decoder_layers(add_lora(make_tiny(name), ModelArguments()).model)
    adapted = [name for name, module in layers.named_modules() if isinstance(module, LoraLayer)]
    assert Counter(".".join(name.split(".")[1:-1]) for name in adapted) == expected


def test_lora_targets_of_single_blocks_with_experts_may_be_any_linear_map():
    model = make_tiny("nemotron_h")
    assert lora_targets(model, "in_proj,up_proj") == ["in_proj", "up_proj"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ORIGINAL_TARGETS, set(ORIGINAL_TARGETS.split(","))),
        ("q_proj, k_proj ,", {"q_proj", "k_proj"}),
        ("all-linear", set(ORIGINAL_TARGETS.split(","))),
        (" All-Linear", set(ORIGINAL_TARGETS.split(","))),
        ("layers.1.mlp.up_proj,lm_head", {"up_proj", "lm_head"}),
    ],
)
def test_add_lora_with_named_targets_adapts_them(text, expected):
    assert adapted_maps(add_lora(make_tiny("gqa"), ModelArguments(peft_target_modules=text))) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gqa", "q_proj,v_prj", "the model has no linear module v_prj; choose among .*q_proj.*lm_head, or all-linear"),
        ("gqa", "proj", "the model has no linear module proj; choose among"),
        ("gqa", "self_attn", "the model has no linear module self_attn; choose among"),
        ("phi3", ORIGINAL_TARGETS, "linear module q_proj, k_proj, v_proj, gate_proj, up_proj; choose among .*qkv_proj"),
        ("qwen3_moe", ORIGINAL_TARGETS, "linear module gate_proj, down_proj, up_proj; choose among .*q_proj"),
        ("gqa", "all-linear,lm_head", "all-linear excludes other names"),
        ("gqa", " ,", "give at least one name"),
    ],
)
def test_check_lora_targets_without_a_match_is_refused(name, text, message):
    arguments = ModelArguments(use_lora=True, peft_target_modules=text)
    with pytest.raises(UserError, match=f"^--peft_target_modules {text}: .*{message}"):
        check_lora_targets(arguments, make_tiny(name).config)


def test_check_lora_targets_default_of_every_family_passes():
    for name in ("gqa", "opt", "qwen3_moe"):
        check_lora_targets(ModelArguments(use_lora=True), make_tiny(name).config)
    check_lora_targets(ModelArguments(peft_target_modules="nothing"), make_tiny("gqa").config)


def slim_copy(model: nn.Module) -> nn.Module:
    """``model`` without its first head group and two FFN columns of layer 0, as a slim model."""
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        columns = [column for column in range(shape.num_columns) if index or column % shape.ffn_width > 1]
        masks.append(LayerMask.from_groups(shape, list(range(index == 0, shape.num_kv_heads)), columns))
    return shrink(model, find_family(model.config), masks)


@pytest.mark.parametrize("name", ["tied", "gemma2", "opt"])
@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "embed_tokens,lm_head,q_proj"])
@pytest.mark.parametrize("slim", [False, True], ids=["dense", "slim"])
def test_fuse_lora_of_tied_embeddings_equals_base_plus_adapters(tmp_path, samples, name, targets, slim):
    model = make_tiny(name, tie_word_embeddings=True)
    if slim:
        model = slim_copy(model)
    base, adapters = str(tmp_path / "base"), str(tmp_path / "adapters")
    model.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = add_lora(load_model(base, "auto", False), ModelArguments(peft_target_modules=targets))
    for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(adapters, save_embedding_layers=False)
    fuse_lora(base, adapters, False).save_pretrained(tmp_path / "fused")
    fused = load_model(str(tmp_path / "fused"), "auto", False)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters).eval()
    with torch.no_grad():
        expected = loaded(samples).logits
        assert torch.allclose(fused(samples).logits, expected, atol=1e-4, rtol=1e-4)
        assert (expected - model(samples).logits).abs().max() > 0.01
    assert fused.config.tie_word_embeddings is False
    assert fused.config.model_type == model.config.model_type


def test_fuse_lora_of_unadapted_tied_embeddings_keeps_them_tied(tmp_path):
    make_tiny("tied").save_pretrained(tmp_path / "base")
    add_lora(load_model(str(tmp_path / "base"), "auto", False), ModelArguments()).save_pretrained(tmp_path / "adapters")
    fused = fuse_lora(str(tmp_path / "base"), str(tmp_path / "adapters"), False)
    assert fused.config.tie_word_embeddings is True
    assert fused.lm_head.weight is fused.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", *TINY_FAMILIES])
def test_get_peft_model_without_targets_adapts_slim_models_like_dense_ones(name):
    dense = make_tiny("gqa" if name == "llama" else name)
    slim = slim_copy(dense)
    try:
        expected = adapted_maps(get_peft_model(dense, LoraConfig(r=2)))
    except ValueError:
        pytest.skip("peft has no defaults for the family itself")
    assert adapted_maps(get_peft_model(slim, LoraConfig(r=2))) == expected
