"""The sensitivity analysis of the dense model, and the curves that are made of it."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from slim_utils.allocation.budget import LayerUnits, layer_units
from slim_utils.allocation.sensitivity import PROBE_SAMPLES, UnitSensitivity, loss_curves, measure
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import SelectionOptions
from slim_utils.slimgpt import SlimGPT
from tests.conftest import make_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mha", "gqa", "opt"])
def test_curves_are_measured_on_the_whole_model(name, samples):
    """At the reference count a curve is the divergence of the model with that one map pruned."""
    model, dense = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family, shapes = find_family(model.config), layer_shapes(model.config)
    settings = PruningSettings(CPU, CPU, selection=SelectionOptions(exact_heads=True, column_group=4))
    host = ResidentModel(model, family)
    units = layer_units(host.layers, family, shapes, settings)
    curves = loss_curves(measure(host, samples, range(4), settings), units)
    assert len(curves) == 4
    for parameter, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, before)
    inputs, probed = [], PROBE_SAMPLES[1]
    linear = family.decoder_layers(model)[2].get_submodule(family.mlp_out)
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = model(samples).logits.log_softmax(-1)[:probed]
        handle.remove()
        pruner = SlimGPT(linear)
        pruner.add_batch(inputs[0].view(len(samples), 16, -1))
        pruner.struct_prune(12, selection=settings.selection)
        got = model(samples[:probed]).logits.log_softmax(-1)
    divergence = functional.kl_div(got, expected, reduction="sum", log_target=True).item() / expected[..., 0].numel()
    curve = curves[2][1]
    assert curve.column and curve.losses[12] == pytest.approx(divergence, rel=1e-3, abs=3e-8)
    assert all((np.diff(of.losses) >= 0).all() and of.losses[0] == 0 for pair in curves for of in pair)
    assert [len(of.losses) for of in curves[0]] == [units[0].heads, 37]


@pytest.mark.parametrize("content", [{"0": [[0.0, 1.0], [0.0, 2.0]]}, {"protocol": [], "layers": {"0": []}}])
def test_what_another_search_measured_is_not_used(content, samples, tmp_path):
    model = make_tiny("mha")
    host, settings = ResidentModel(model, find_family(model.config)), PruningSettings(CPU, CPU)
    (tmp_path / "measured.json").write_text(json.dumps(content))
    found = measure(host, samples, range(2), settings, tmp_path / "measured.json")
    assert found == measure(host, samples, range(2), settings)
    assert found == measure(host, samples, range(2), settings, tmp_path / "measured.json")


def test_dead_columns_do_not_hide_what_the_others_cost(samples):
    model = make_tiny("mha")
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data[:20] = 0
    family, shapes, settings = find_family(model.config), layer_shapes(model.config), PruningSettings(CPU, CPU)
    host = ResidentModel(model, family)
    units = layer_units(host.layers, family, shapes, settings)
    losses = loss_curves(measure(host, samples, range(4), settings), units)[1][1].losses
    assert losses[20] <= 1e-4 * losses[-1] and 1e-4 < losses[-1] < 1


def test_layers_that_are_not_measured_take_their_losses_from_their_neighbours():
    units = [LayerUnits(3, 3, 10, 1)] * 3
    losses = enumerate((0.01, None, 0.04))
    layers = {
        i: [UnitSensitivity([0, 1, 4], 1, loss), UnitSensitivity([0, 2, 2], 2, loss and 1.0)] for i, loss in losses
    }
    heads = [of_heads.losses for of_heads, _ in loss_curves(layers, units)]
    assert heads[1].tolist() == pytest.approx([0, 0.02, 0.08])
    assert heads[2].tolist() == pytest.approx([0, 0.04, 0.16])
