"""What a run trains: block weights and scales, for every family, and the checkpoints that hold them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from slim_utils.common.adapters import fuse_adapters
from slim_utils.common.loading import load_model
from slim_utils.families import find_family, layer_shapes
from tests.tiny_models import ALL_TINY, make_tiny
from train_utils.finetune_args import ModelArguments
from train_utils.trainable import (
    SCALE,
    add_scales,
    fuse_scales,
    prepare_model,
    scaled_maps,
    train_only,
    with_trained_weights,
)


class Precision:
    """Flags of a run that computes in fp32, or in bf16."""

    def __init__(self, bf16: bool = False) -> None:
        self.bf16, self.fp16, self.gradient_checkpointing, self.process_index = bf16, False, False, 0


def logits(model, samples) -> torch.Tensor:
    with torch.no_grad():
        return model(samples).logits


# Also layers without attention, and without an FFN.
@pytest.mark.parametrize("variant", [*ALL_TINY, "qwen3_5_text", "nemotron_h"])
def test_add_scales_has_one_per_head_and_column(variant, samples):
    model = make_tiny(variant)
    dense, names = logits(model, samples), dict(model.named_parameters()).keys()
    scales = add_scales(model)
    assert torch.equal(logits(model, samples), dense)
    expected = 0
    for shape in layer_shapes(model.config):
        expected += shape.num_heads + (0 if shape.num_experts else shape.num_columns)
    assert sum(scale.numel() for scale in scales.values()) == expected
    assert dict(model.named_parameters()).keys() - names == scales.keys()


@pytest.mark.parametrize("variant", ALL_TINY)
def test_fuse_scales_gives_the_logits_of_the_scaled_model(variant, samples, tmp_path):
    model = make_tiny(variant)
    model.save_pretrained(tmp_path)
    dense = logits(model, samples)
    train_only(model, add_scales(model).values(), Precision())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, linear, _ in scaled_maps(model):
            getattr(linear, SCALE).copy_(0.5 + torch.rand(getattr(linear, SCALE).shape, generator=generator))
    scaled = logits(model, samples)
    fused = fuse_scales(str(tmp_path), model, False)
    assert not [name for name, _ in fused.named_parameters() if name.endswith(SCALE)]
    error = (logits(fused, samples) - scaled).abs().max()
    assert error <= 1e-5 * scaled.abs().max() < (scaled - dense).abs().max()


@pytest.mark.parametrize("variant", ALL_TINY)
def test_with_trained_weights_changes_the_block_weights_alone(variant, tmp_path):
    model = make_tiny(variant)
    # Weights that bf16 rounds: frozen ones must not come from the copy in training.
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    layers = find_family(model.config).decoder_layers(model)
    train_only(model, layers.parameters(), Precision(bf16=True))
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.25)
    saved = with_trained_weights(str(tmp_path), model, False).state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and saved.keys() == before.keys()
    for name, weight in saved.items():
        assert torch.equal(weight, before[name] + 0.25 if name in trained else before[name]), name


@pytest.mark.parametrize(("variant", "fused"), [("gqa", False), ("ernie4_5_moe", False), ("ernie4_5_moe", True)])
def test_train_only_trains_parameters_that_get_gradients(variant, fused, samples, tmp_path):
    model = make_tiny(variant)
    if fused:
        get_peft_model(make_tiny(variant), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
        model = fuse_adapters(model, str(tmp_path))
    train_only(model, find_family(model.config).decoder_layers(model).parameters(), Precision())
    model(input_ids=samples, labels=samples).loss.backward()
    # Several processes would wait for the gradient of any other.
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_fuse_scales_of_a_bf16_checkpoint_rounds_once(tmp_path):
    model = make_tiny("gqa", torch.bfloat16)
    model.save_pretrained(tmp_path)
    add_scales(model)
    linear = next(linear for name, linear, _ in scaled_maps(model) if "down_proj" in name)
    getattr(linear, SCALE).data.fill_(1.003)
    fused = fuse_scales(str(tmp_path), model, False)
    dense = load_model(str(tmp_path), "auto", False)
    weight, expected = (
        next(linear.weight for name, linear, _ in scaled_maps(m) if "down_proj" in name) for m in (fused, dense)
    )
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (expected.float() * 1.003).bfloat16())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("variant", ["opt", "qwen2"])
def test_prepare_model_with_lora_in_bf16_trains_in_fp32(variant, bias, samples):
    options = ModelArguments(use_lora=True, peft_lora_bias=bias)
    model = prepare_model(make_tiny(variant), SimpleNamespace(model=options, training=Precision(bf16=True)))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.endswith(".bias") for name in trained) == (bias != "none")
    # A scaler of fp16 gradients refuses any other.
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad and parameter.ndim > 1]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=samples, labels=samples).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
