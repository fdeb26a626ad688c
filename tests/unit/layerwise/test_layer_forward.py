"""A layer in three parts against the layer as it is, and how often its maps are run."""

from collections import Counter

import pytest
import torch

from slim_utils.families import find_family
from slim_utils.layerwise import layer_forward as layer_replay
from slim_utils.layerwise.layer_forward import LayerForward, capture_layer_kwargs
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import solve_bytes
from tests.tiny_models import ALL_TINY, make_tiny

CPU = torch.device("cpu")
# The same memory, but another device than the one that computes.
ELSEWHERE = torch.device("cpu", 0)


def first_replay(model, samples, cache_dev=CPU, **settings) -> LayerForward:
    """The first layer on its inputs."""
    family, settings = find_family(model.config), PruningSettings(CPU, cache_dev, **settings)
    layers = family.decoder_layers(model)
    hidden, calls = capture_layer_kwargs(model, layers, samples, settings)
    return LayerForward(layers[0], family, hidden, calls[0], settings)


def plain_forward(model, samples, name: str):
    """Arguments of a module of the first layer, and that layer's output, in a forward of the whole model."""
    seen = {}
    layer = find_family(model.config).decoder_layers(model)[0]

    def keep_output(module, args, output):
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.update(inputs=args)),
        layer.register_forward_hook(keep_output),
    ]
    model(samples)
    for handle in handles:
        handle.remove()
    return seen["inputs"], seen["output"]


@torch.no_grad()
@pytest.mark.parametrize("cache_dev", [CPU, ELSEWHERE])
@pytest.mark.parametrize("variant", [*ALL_TINY, "gemma4_text of inputs by layer"])
def test_parts_are_those_of_the_whole_layer(variant, cache_dev, samples):
    model = make_tiny(variant, torch.float64)
    replay = first_replay(model, samples, cache_dev, tokens_per_forward=48)
    family, layer = replay.family, replay.layer
    (expected,), _ = plain_forward(model, samples, family.attention_out)
    assert torch.allclose(torch.cat(list(replay.attention_inputs())), expected)

    # As pruning does, in between.
    layer.get_submodule(family.attention_out).weight[:, :8] *= 0.5
    replay.finish_attention()
    if hasattr(layer, "mlp") and hasattr(layer.mlp, "experts"):
        expected, _ = plain_forward(model, samples, family.experts)
        got = [torch.cat(parts) for parts in zip(*replay.expert_calls(), strict=True)]
        layer.mlp.experts.down_proj[:, :, :8] *= 0.5
    else:
        expected, _ = plain_forward(model, samples, family.mlp_out)
        got = [torch.cat(list(replay.column_inputs()))]
        layer.get_submodule(family.mlp_out).weight[:, :8] *= 0.5
    for tensor, wanted in zip(got, expected, strict=True):
        assert torch.allclose(tensor.flatten(), wanted.flatten())

    replay.advance()
    _, expected = plain_forward(model, samples, family.attention_out)
    assert torch.allclose(replay.hidden, expected)


@torch.no_grad()
@pytest.mark.parametrize(("cache_dev", "times"), [(CPU, 1), (ELSEWHERE, 2)])
def test_every_map_is_run_once(cache_dev, times, samples):
    model = make_tiny("gqa")
    replay, calls = first_replay(model, samples, cache_dev), Counter()
    for name, module in replay.layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    list(replay.attention_inputs())
    replay.finish_attention()
    list(replay.column_inputs())
    replay.advance()
    attention = dict.fromkeys([f"self_attn.{part}_proj" for part in "qkvo"], 1)
    assert calls == attention | {"mlp.gate_proj": times, "mlp.up_proj": times, "mlp.down_proj": 1}


@torch.no_grad()
def test_columns_are_kept_only_where_there_is_room(samples, monkeypatch):
    model = make_tiny("gqa")
    # The solve of the FFN's map, but for the Hessian, comes first.
    solve = solve_bytes(40, model.config.hidden_size, 20, torch.float64) - 4 * 40**2
    inputs = 8 * 16 * 40 * 4
    for free, kept in ((solve + 2 * inputs, True), (solve + 2 * inputs - 1, False)):
        monkeypatch.setattr(layer_replay, "free_memory", lambda device, free=free: free)
        replay = first_replay(make_tiny("gqa"), samples)
        list(replay.attention_inputs())
        replay.finish_attention()
        list(replay.column_inputs())
        assert bool(replay._columns) == kept


@pytest.mark.parametrize(
    ("batch_samples", "expected"), [(128, [(0, 4), (4, 8)]), (3, [(0, 3), (3, 6), (6, 8)]), (1, None)]
)
def test_batches_hold_so_many_tokens_and_samples(samples, batch_samples, expected):
    spans = PruningSettings(CPU, CPU, batch_samples=batch_samples, tokens_per_forward=64).micro_batches(samples)
    assert spans == (expected or [(i, i + 1) for i in range(8)])
