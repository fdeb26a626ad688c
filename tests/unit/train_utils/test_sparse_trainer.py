"""Mask callback with any optimizer, and focal loss."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import count_weights, removed_indices, shrink, zero_removed
from tests.tiny_models import make_tiny
from train_utils.finetune_dataset import IGNORED_LABEL
from train_utils.sparse_trainer import MaskCallback, focal_loss, masked_slices

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3),
    "adam l2": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.3),
    "sgd momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.3),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


def masks_of(config) -> list[LayerMask]:
    """Masks that remove a different kv group and different columns in every layer."""
    return [
        LayerMask.from_groups(
            shape,
            [group for group in range(shape.num_kv_heads) if group != index % max(shape.num_kv_heads, 1)],
            [column for column in range(shape.num_columns) if column % shape.ffn_width % (index + 2)],
        )
        for index, shape in enumerate(layer_shapes(config))
    ]


def masked_model(variant: str):
    """A random masked model, its family and masks."""
    model = make_tiny(variant)
    family, masks = find_family(model.config), masks_of(model.config)
    zero_removed(model, family, masks)
    return model, family, masks


def removed_weights(model, masks) -> list[torch.Tensor]:
    """The removed weights, selected by module name, independent of ``removed_indices``."""
    removed = []
    for layer, mask in zip(model.model.layers, masks, strict=True):
        dim, shape = mask.shape.head_dim, mask.shape
        heads = [h * dim + i for h in range(shape.num_heads) if h not in mask.kept_heads for i in range(dim)]
        kv = [h * dim + i for h in range(shape.num_kv_heads) if h not in mask.kept_kv_heads for i in range(dim)]
        columns = [c for c in range(shape.num_columns) if c not in mask.kept_columns]
        attention, mlp = layer.self_attn, layer.mlp
        removed.append(attention.o_proj.weight[:, heads])
        rows = [(attention.q_proj, heads), (attention.k_proj, kv), (attention.v_proj, kv)]
        if shape.num_experts:
            width = shape.num_columns // shape.num_experts
            for expert, column in (divmod(column, width) for column in columns):
                removed += [mlp.experts.down_proj[expert, :, column], mlp.experts.gate_up_proj[expert, column]]
                removed.append(mlp.experts.gate_up_proj[expert, width + column])
        else:
            removed.append(mlp.down_proj.weight[:, columns])
            rows += [(mlp.gate_proj, columns), (mlp.up_proj, columns)]
        for linear, indices in rows:
            removed.append(linear.weight[indices])
            if linear.bias is not None:
                removed.append(linear.bias[indices])
    return removed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", ["gqa", "biases", "mixtral"])
def test_mask_callback_with_any_optimizer_keeps_zeros_after_every_step(samples, optimizer, variant):
    model, family, masks = masked_model(variant)
    before = [parameter.clone() for parameter in model.parameters()]
    mask = MaskCallback(list(masked_slices(model, family, masks)))
    instance = OPTIMIZERS[optimizer](model.parameters())
    model.train()
    for step in range(6):
        model(samples, labels=samples).loss.backward()
        if step % 2:  # two accumulated batches per step
            instance.step()
            assert all(not weights.any() for weights in removed_weights(model, masks))
            mask.on_optimizer_step()
            instance.zero_grad()
    assert (mask.steps, int(mask.moved), mask.nonzeros()) == (3, 0, 0)
    assert mask.size() == sum(weights.numel() for weights in removed_weights(model, masks))
    assert all((old != new).any() for old, new in zip(before, model.parameters(), strict=True))

    model.eval()
    with torch.no_grad():
        difference = (shrink(model, family, masks)(samples).logits - model(samples).logits).abs().max()
    assert difference < 1e-4


def test_mask_callback_counts_moved_weights_and_zeroes_them():
    model, family, masks = masked_model("gqa")
    mask = MaskCallback(list(masked_slices(model, family, masks)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    moved = mask.nonzeros()
    mask.on_optimizer_step()
    assert int(mask.moved) == moved == mask.size()
    assert mask.nonzeros() == 0
    assert all(not weights.any() for weights in removed_weights(model, masks))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_mask_callback_with_lora_keeps_zeros_in_the_fused_model(samples, bias):
    model, family, masks = masked_model("biases")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, bias=bias))
    mask = MaskCallback(list(masked_slices(adapted, family, masks)))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(4):
        adapted(input_ids=samples, labels=samples).loss.backward()
        optimizer.step()
        mask.on_optimizer_step()
        optimizer.zero_grad()
    assert int(mask.moved) == mask.nonzeros() == 0
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=samples).logits
        fused = adapted.merge_and_unload()
        assert all(not weights.any() for weights in removed_weights(fused, masks))
        assert (fused(samples).logits - expected).abs().max() < 1e-4
        assert (shrink(fused, family, masks)(samples).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_focal_loss_matches_the_formula_of_the_paper(gamma):
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, IGNORED_LABEL, 4, 5], [IGNORED_LABEL, 0, 6, 3, IGNORED_LABEL]])
    terms = []
    for b in range(2):
        for t in range(4):
            if labels[b, t + 1] != IGNORED_LABEL:
                p = logits[b, t].softmax(-1)[labels[b, t + 1]]
                terms.append(-((1 - p) ** gamma) * p.log())
    outputs = SimpleNamespace(logits=logits)
    assert focal_loss(outputs, labels, gamma=gamma) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-5)
    assert focal_loss(outputs, labels, 10, gamma=gamma) == pytest.approx(float(sum(terms) / 10), rel=1e-5)
    if gamma == 0:
        library = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert focal_loss(outputs, labels, gamma=0) == pytest.approx(float(library), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3_5_text", "deepseek_v3", "gpt_oss"])
def test_masked_slices_of_layers_without_some_maps_are_those_of_the_others(name):
    model = make_tiny(name)
    family = find_family(model.config)
    masks = masks_of(model.config)
    zero_removed(model, family, masks)
    mask = MaskCallback(list(masked_slices(model, family, masks)))
    weights = sum(
        count_weights(parameters[name], dim, indices)
        for layer, layer_mask in zip(family.decoder_layers(model), masks, strict=True)
        for parameters in [dict(layer.named_parameters())]
        for name, (dim, indices) in removed_indices(family, layer_mask).items()
        if name in parameters
    )
    assert mask.size() == weights > 0 and not mask.nonzeros()
