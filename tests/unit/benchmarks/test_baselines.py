"""Baselines of the quality benchmark."""

import pytest
import torch

from benchmarks.baselines import (
    ChannelStatistics,
    mask_lowest,
    prune_flap,
    prune_magnitude,
    prune_wanda_sp,
    standardised,
)
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.profiling.model_stats import removed_share
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
SETTINGS = PruningSettings(CPU, CPU)
COUNTS = {"mha": [[2, 10]] * 4, "gqa": [[1, 10]] * 4}


def test_channel_statistics_of_batches_equal_those_of_all_tokens():
    inputs = torch.randn(6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    statistics = ChannelStatistics(7)
    for batch in inputs.split(2):
        statistics.add(batch)
    tokens = inputs.flatten(0, 1)
    assert torch.allclose(statistics.mean, tokens.mean(0))
    assert torch.allclose(statistics.variance, tokens.var(0, correction=0))
    assert torch.allclose(statistics.norm, tokens.norm(dim=0))


def test_mask_lowest_of_grouped_heads_removes_the_lowest_per_group():
    shape = layer_shapes(make_tiny("gqa").config)[0]
    mask = mask_lowest(shape, torch.tensor([3.0, 1, 2, 9, 8, 7]), torch.arange(40.0).flip(0), 1, 38)
    assert (mask.kept_heads, mask.kept_columns) == ([0, 2, 3, 4], [0, 1])
    assert len(mask_lowest(shape, torch.rand(6), torch.rand(40), 9, 99).kept_columns) == 1


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_baselines_with_given_counts_zero_the_masked_weights(variant, samples):
    for prune in (
        lambda model: prune_magnitude(model, COUNTS[variant]),
        lambda model: prune_wanda_sp(model, samples, COUNTS[variant], SETTINGS),
    ):
        model, dense = make_tiny(variant), make_tiny(variant)
        masks = prune(model)
        for layer, before, mask in zip(model.model.layers, dense.model.layers, masks, strict=True):
            assert (len(mask.kept_heads), len(mask.kept_columns)) == (4, 30)
            weight, old = layer.mlp.down_proj.weight, before.mlp.down_proj.weight
            assert torch.equal(weight[:, mask.kept_columns], old[:, mask.kept_columns])
            assert weight[:, mask.removed_units()["columns"]].count_nonzero() == 0


def test_prune_wanda_sp_of_the_second_layer_uses_outputs_of_the_pruned_first(samples):
    model, dense = make_tiny("mha"), make_tiny("mha")
    masks = prune_wanda_sp(model, samples, COUNTS["mha"], SETTINGS)
    inputs = []
    for pruned in (model, dense):
        # With the second layer still dense.
        pruned.model.layers[1].load_state_dict(make_tiny("mha").model.layers[1].state_dict())
        down = pruned.model.layers[1].mlp.down_proj
        handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            pruned(samples)
        handle.remove()
    kept = [
        (dense.model.layers[1].mlp.down_proj.weight.abs() * tokens.norm(dim=0)).mean(0).argsort()[10:].sort().values
        for tokens in inputs
    ]
    assert masks[1].kept_columns == kept[0].tolist()
    assert masks[1].kept_columns != kept[1].tolist()


@pytest.mark.parametrize("variant", ["mha", "gqa"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_prune_flap_with_a_share_removes_it_and_adds_biases(variant, share, samples):
    model = make_tiny(variant)
    family = find_family(model.config)
    masks = prune_flap(model, samples, share, SETTINGS)
    # Within one head unit, here 4 % of the weights.
    assert removed_share(family.decoder_layers(model), family, masks) == pytest.approx(share, abs=0.04)
    assert any(layer.mlp.down_proj.bias is not None for layer in model.model.layers)
    sizes = {len(mask.kept_columns) for mask in masks}
    assert len(sizes) > 1


def test_prune_flap_bias_is_the_output_for_the_mean_of_removed_inputs(samples):
    model, dense = make_tiny("mha"), make_tiny("mha")
    inputs = []
    dense.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        dense(samples)
    masks = prune_flap(model, samples, 0.3, SETTINGS)
    removed = masks[0].removed_units()["columns"]
    expected = dense.model.layers[0].mlp.down_proj.weight[:, removed] @ inputs[0].flatten(0, 1).mean(0)[removed]
    assert torch.allclose(model.model.layers[0].mlp.down_proj.bias, expected, rtol=1e-4, atol=1e-5)


def test_standardised_scores_have_mean_0_and_std_1():
    scores = standardised(torch.rand(50, generator=torch.Generator().manual_seed(0)))
    assert scores.mean().item() == pytest.approx(0, abs=1e-6) and scores.std().item() == pytest.approx(1)
