"""Sensitivity analysis of the dense model, and its loss curves."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from slim_utils.allocation import sensitivity
from slim_utils.allocation.budget import LayerUnits, layer_units
from slim_utils.allocation.sensitivity import (
    COLUMN_PROBE_SAMPLES,
    LayerSensitivity,
    UnitSensitivity,
    loss_curves,
    measure,
)
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan
from slim_utils.obs import SelectionOptions
from slim_utils.slimgpt import SlimGPT
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", ["mha", "gqa", "opt", "gemma4_text of inputs by layer"])
def test_loss_curves_at_the_reference_count_are_the_divergence(name, stride, samples, monkeypatch):
    """The loss at the reference count is the divergence, at some tokens, of the model with that map alone pruned."""
    monkeypatch.setattr(sensitivity, "PROBE_STRIDE", stride)
    model, dense = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family, shapes = find_family(model.config), layer_shapes(model.config)
    settings = PruningSettings(CPU, CPU, selection=SelectionOptions(exact_heads=True, column_group=4))
    host = ResidentModel(model, family)
    units = layer_units(host.layers, family, shapes, settings)
    curves = loss_curves(measure(host, samples, range(4), settings), units)
    assert len(curves) == 4
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)
    inputs, probed = [], COLUMN_PROBE_SAMPLES
    linear = family.decoder_layers(model)[2].get_submodule(family.mlp_out)
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = model(samples).logits[:probed, stride - 1 :: stride].log_softmax(-1)
        handle.remove()
        pruner = SlimGPT(linear)
        pruner.add_batch(inputs[0].view(len(samples), 16, -1))
        # REFERENCE_RATIO of the columns, 12 of 40.
        count = round(0.3 * linear.in_features)
        pruner.struct_prune(count, selection=settings.selection)
        changed = model(samples[:probed]).logits[:, stride - 1 :: stride].log_softmax(-1)
    total = functional.kl_div(changed, expected, reduction="sum", log_target=True).item()
    divergence = total / expected[..., 0].numel()
    curve = curves[2].columns
    assert curve.column and curve.losses[count] == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    for losses in (curve.losses for layer in curves for curve in (layer.heads, layer.columns)):
        assert (np.diff(losses) >= 0).all() and losses[0] == 0
    assert (len(curves[0].heads.losses), len(curves[0].columns.losses)) == (units[0].heads, 37)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "gemma4_text"])
def test_measure_loss_of_columns_of_experts_is_the_divergence_of_the_pruned_model(name, samples, monkeypatch):
    """The loss at the reference count is that of the model with the experts of one layer alone pruned."""
    monkeypatch.setattr(sensitivity, "PROBE_STRIDE", 1)
    model, dense = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family, settings, probe = find_family(model.config), PruningSettings(CPU, CPU), samples[:COLUMN_PROBE_SAMPLES]
    columns = measure(ResidentModel(model, family), samples, range(4), settings)[2].columns
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)
    plans = [LayerPlan(columns=columns.count if index == 2 else 0) for index in range(4)]
    with torch.no_grad():
        expected = model(probe).logits.log_softmax(-1)
        prune_layers(model, family, samples, plans, settings)
        changed = model(probe).logits.log_softmax(-1)
    total = functional.kl_div(changed, expected, reduction="sum", log_target=True).item()
    assert columns.loss == pytest.approx(total / expected[..., 0].numel(), rel=1e-3, abs=3e-8)
    assert (np.diff(columns.errors) >= 0).all()


PROTOCOL = [4, 0.3, 0.9, 4, 2, 256]
HEADS = {"errors": [0.0, 1.0], "count": 1, "loss": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        {"0": [[0.0, 1.0], [0.0, 2.0]]},
        {"format": 2, "protocol": [], "layers": {"0": {"heads": HEADS, "columns": HEADS}}},
        # Version 1, which had no number.
        {"protocol": PROTOCOL, "layers": {"0": [HEADS, HEADS], "1": [HEADS, HEADS]}},
    ],
)
def test_measure_cache_of_other_protocol_or_version_is_ignored(content, samples, tmp_path):
    model = make_tiny("mha")
    host, settings = ResidentModel(model, find_family(model.config)), PruningSettings(CPU, CPU)
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    measured = measure(host, samples, range(2), settings, path)
    assert measured == measure(host, samples, range(2), settings)
    assert json.loads(path.read_text())["protocol"] == PROTOCOL


def test_measure_complete_cache_is_returned(samples, tmp_path, monkeypatch):
    model = make_tiny("mha")
    host, settings = ResidentModel(model, find_family(model.config)), PruningSettings(CPU, CPU)
    measured = measure(host, samples, range(2), settings, tmp_path / "measured.json")
    monkeypatch.setattr(sensitivity, "_measure_layers", lambda *args: pytest.fail("measured again"))
    assert measure(host, samples, range(2), settings, tmp_path / "measured.json") == measured


def test_loss_curves_with_dead_columns_measure_the_others(samples):
    model = make_tiny("mha")
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data[:20] = 0
    family, shapes, settings = find_family(model.config), layer_shapes(model.config), PruningSettings(CPU, CPU)
    host = ResidentModel(model, family)
    units = layer_units(host.layers, family, shapes, settings)
    losses = loss_curves(measure(host, samples, range(4), settings), units)[1].columns.losses
    assert losses[20] <= 1e-4 * losses[-1] and 1e-4 < losses[-1] < 1


def test_loss_curves_of_unmeasured_layers_are_interpolated():
    units = [LayerUnits(3, 3, 10, 1)] * 3
    losses = enumerate((0.01, None, 0.04))
    layers = {
        index: LayerSensitivity(
            heads=UnitSensitivity([0, 1, 4], 1, loss), columns=UnitSensitivity([0, 2, 2], 2, loss and 1.0)
        )
        for index, loss in losses
    }
    heads = [layer.heads.losses for layer in loss_curves(layers, units)]
    assert heads[1].tolist() == pytest.approx([0, 0.02, 0.08])
    assert heads[2].tolist() == pytest.approx([0, 0.04, 0.16])
