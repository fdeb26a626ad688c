"""The layer walk against a plain one that runs the whole model for every Hessian."""

import inspect
import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from slim_utils.allocation.alignment import Alignment
from slim_utils.allocation.planner import plans_of
from slim_utils.common.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.layer_forward import LayerForward
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.slimgpt import SlimGPT
from tests import reference_slimgpt
from tests.tiny_models import ALL_TINY, make_tiny, set_attention

CPU = torch.device("cpu")
RATIOS = [0.2, 0.35, 0.5, 0.6]


def walk(model, samples, ratios=RATIOS, alignment=None, **settings):
    """Masks and reports of pruning ``model`` in place."""
    settings = PruningSettings(CPU, CPU, **settings)
    plans = plans_of(model, ratios, settings, alignment)
    return prune_layers(model, find_family(model.config), samples, plans, settings)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
# The queries of OLMo 2 are normed over all heads: the walk zeroes removed ones at once, the plain walk never.
@pytest.mark.parametrize("variant", [name for name in ALL_TINY if name != "olmo2"])
def test_same_model_as_the_plain_walk(variant, implementation, samples):
    model, expected = make_tiny(variant, torch.float64), make_tiny(variant, torch.float64)
    set_attention(model, implementation)
    masks, reports = walk(
        model, samples, percdamp=0.01, gqa_unit="kv_group", alignment=Alignment(expert_columns_multiple=1)
    )
    removed = reference_slimgpt.prune_model(expected, samples, RATIOS, percdamp=0.01)
    for report, (groups, columns) in zip(reports, removed, strict=True):
        assert (report.attention.pruned_units, report.mlp.pruned_units) == (groups, columns)
    assert any(groups for groups, _ in removed)
    # The walk accumulates its Hessian in fp32, the plain one in fp64. That of BLOOM's 96 columns, for 128 tokens, is
    # worse conditioned than those of 40 columns.
    tolerance = 1e-3 if variant == "bloom" else 1e-4
    for name, weight in expected.state_dict().items():
        got = model.state_dict()[name]
        assert torch.allclose(got, weight, rtol=tolerance, atol=tolerance * weight.abs().max().item()), name
    assert [mask.shape for mask in masks] == layer_shapes(model.config)


def test_layers_that_share_keys_and_values_as_the_plain_walk(samples):
    name = "gemma4_text of inputs by layer"
    model, expected = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    # Several batches, of different sizes.
    masks, _ = walk(model, samples, RATIOS, batch_samples=3)
    reference_slimgpt.prune_model(expected, samples, RATIOS, percdamp=0.01, query_heads=True)
    assert [mask.shape.kv_sharing for mask in masks] == ["store", "store", "reuse", "reuse"]
    assert [mask.shape.num_columns for mask in masks] == [40, 40, 80, 80]
    for key, weight in expected.state_dict().items():
        got = model.state_dict()[key]
        assert torch.allclose(got, weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item()), key


def test_query_heads_as_units(samples):
    model, expected = make_tiny("gqa", torch.float64), make_tiny("gqa", torch.float64)
    masks, _ = walk(model, samples, RATIOS)
    reference_slimgpt.prune_model(expected, samples, RATIOS, percdamp=0.01, query_heads=True)
    # Three query heads a group: round(3 · ratio) of each go.
    assert [len(mask.kept_heads) for mask in masks] == [4, 4, 2, 2]
    assert all(mask.kept_kv_heads == [0, 1] for mask in masks)
    for name, weight in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item()), name


@pytest.mark.parametrize(
    ("unit", "multiples"),
    [
        ("query_head", {}),
        ("kv_group", {}),
        ("kv_group", {"heads_multiple": 2, "columns_multiple": 8}),
        ("query_head", {"columns_multiple": 16, "uniform": True}),
        ("query_head", {"heads_multiple": 4}),
    ],
)
@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_pruning_gives_the_sizes_planned(samples, variant, unit, multiples):
    model, settings = make_tiny(variant), PruningSettings(CPU, CPU, gqa_unit=unit)
    plans = plans_of(model, RATIOS, settings, Alignment(**multiples))
    masks, _ = prune_layers(model, find_family(model.config), samples, plans, settings)
    assert [mask.plan for mask in masks] == plans
    for plan, mask in zip(plans, masks, strict=True):
        sized = settings.size_mask(mask.shape, plan)
        assert [len(sized.kept_heads), len(sized.kept_kv_heads), len(sized.kept_columns)] == [
            len(mask.kept_heads),
            len(mask.kept_kv_heads),
            len(mask.kept_columns),
        ]
    if multiples.get("heads_multiple") == 2:
        assert all(len(mask.kept_kv_heads) % 2 == 0 and len(mask.kept_columns) % 8 == 0 for mask in masks)
    if multiples.get("heads_multiple") == 4:
        assert all(len(mask.kept_heads) == 4 for mask in masks)


def test_multi_head_attention_has_one_unit(samples):
    whole, single = make_tiny("mha"), make_tiny("mha")
    assert walk(whole, samples)[0] == walk(single, samples, gqa_unit="kv_group")[0]


@pytest.mark.parametrize(("batch_samples", "tokens_per_forward"), [(128, 8192), (3, 8192), (128, 32), (5, 48), (1, 1)])
def test_batches_do_not_matter(samples, batch_samples, tokens_per_forward):
    whole, parts = make_tiny("gqa"), make_tiny("gqa")
    expected, _ = walk(whole, samples)
    masks, _ = walk(parts, samples, batch_samples=batch_samples, tokens_per_forward=tokens_per_forward)
    assert masks == expected
    for name, weight in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], weight, rtol=1e-3, atol=1e-3), name


def test_layers_outside_the_range_are_untouched(samples):
    model, dense = make_tiny("mha"), make_tiny("mha")
    masks, reports = walk(model, samples, [0.0, 0.5, 0.0, 0.0])
    assert [report.layer for report in reports] == [1]
    for index in (0, 2, 3):
        assert len(masks[index].kept_columns) == dense.config.intermediate_size
        for got, expected in zip(
            model.model.layers[index].parameters(), dense.model.layers[index].parameters(), strict=True
        ):
            assert torch.equal(got, expected)


def test_nothing_to_prune_runs_nothing(samples):
    model = make_tiny("mha")
    masks, reports = walk(model, samples, [0.0] * 4)
    assert reports == []
    assert all(len(mask.kept_heads) == 6 for mask in masks)


def test_without_compensation_the_rest_stays(samples):
    model, dense = make_tiny("mha"), make_tiny("mha")
    masks, reports = walk(model, samples, compensate=False)
    for index, mask in enumerate(masks):
        got, expected = (m.model.layers[index].mlp.down_proj.weight for m in (model, dense))
        assert torch.equal(got[:, mask.kept_columns], expected[:, mask.kept_columns])
        assert reports[index].mlp.error_compensated == pytest.approx(reports[index].mlp.error_uncompensated)


def test_every_argument_of_a_layers_call_is_replayed(samples, monkeypatch):
    """A layer that some later version calls with more, by position and by name, is called the same way."""
    model = make_tiny("mha")
    seen = []
    original = type(model.model.layers[0]).forward

    def forward(self, hidden_states, extra_position=None, *, extra_name=None, **kwargs):
        seen.append((extra_position, extra_name, sorted(kwargs)))
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)

    class Caller(nn.Module):
        """A decoder list that hands every layer something new."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, "position", extra_name=torch.ones(1), **kwargs)

    layers = model.model.layers
    family = find_family(model.config)
    model.model.layers = nn.ModuleList(Caller(layer) for layer in layers)
    monkeypatch.setattr(type(family), "decoder_layers", lambda self, model: layers)
    settings = PruningSettings(CPU, CPU)
    prune_layers(model, family, samples, plans_of(model, RATIOS, settings), settings)
    assert seen
    assert all(position == "position" and name.item() == 1 for position, name, _ in seen)
    names = {tuple(names) for _, _, names in seen}
    assert len(names) == 1
    assert {"attention_mask", "position_embeddings", "position_ids"} <= set(names.pop())


def test_the_layers_are_themselves_again(samples):
    model = make_tiny("mha")
    walk(model, samples)
    for layer in model.model.layers:
        assert inspect.ismethod(layer.forward)
        assert layer.forward.__func__ is type(layer).forward
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("where", ["model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"])
def test_non_finite_activations_stop_with_the_layer_named(samples, where):
    model = make_tiny("mha")
    model.get_parameter(where).data.fill_(float("inf"))
    with pytest.raises(UserError, match="the embeddings" if "embed" in where else r"layer 1 .*--dtype"):
        walk(model, samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, samples):
    model = make_tiny("gqa", dtype)
    masks, reports = walk(model, samples)
    assert model.dtype == dtype
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for index, mask in enumerate(masks):
        weight = model.model.layers[index].mlp.down_proj.weight
        removed = sorted(set(range(40)) - set(mask.kept_columns))
        assert torch.count_nonzero(weight[:, removed]) == 0
    assert all(report.mlp.error_compensated < report.mlp.error_uncompensated for report in reports)


def test_one_log_line_a_layer(samples, caplog):
    with caplog.at_level(logging.INFO):
        walk(make_tiny("gqa"), samples)
    lines = [record.getMessage() for record in caplog.records if record.name == "slim_utils.layerwise.pruner"]
    assert len(lines) == 4
    assert lines[2].startswith("layer 2/4 ratio 0.6667/0.5000: heads −4/6")


def test_quantised_weights_are_refused():
    with pytest.raises(UserError, match="quantised"):
        find_family(LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}))


def test_norms_over_all_heads_keep_their_scale(samples):
    """OLMo 2 after the walk: removed queries are zero, and the others as large as if all heads still counted."""
    model = make_tiny("olmo2", torch.float64)
    dense = make_tiny("olmo2", torch.float64)
    masks, _ = walk(model, samples, [0.5] * 4, gqa_unit="kv_group")
    for layer, old, mask in zip(model.model.layers, dense.model.layers, masks, strict=True):
        assert len(mask.kept_heads) == 3
        rows = [4 * head + i for head in mask.kept_heads for i in range(4)]
        hidden = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            got, expected = (part.self_attn.q_norm(part.self_attn.q_proj(hidden)) for part in (layer, old))
        assert got[:, rows].count_nonzero() == got.count_nonzero()
        # Not the same, since the mean square of some heads stands for that of all; but of the same size.
        assert got[:, rows].norm() == pytest.approx(expected[:, rows].norm().item(), rel=0.2)


def full_memory(monkeypatch, fits):
    """Let the device's memory be full wherever ``fits(replay, batch)`` does not hold; the sizes that were tried."""
    run, tried = LayerForward._run, []

    def limited(self, batch):
        tried.append(len(batch))
        if not fits(self, batch):
            raise torch.OutOfMemoryError("full")
        return run(self, batch)

    monkeypatch.setattr(LayerForward, "_run", limited)
    return tried


@pytest.mark.parametrize("variant", ["gqa", "mixtral", "olmo2"])
def test_smaller_batches_where_memory_is_full(variant, samples, monkeypatch, caplog):
    whole, parts = make_tiny(variant), make_tiny(variant)
    expected, _ = walk(whole, samples)
    # The first layer fits; later the heads do, and the columns do not.
    tried = full_memory(monkeypatch, lambda replay, batch: len(batch) <= 2 or not replay._attention or len(tried) <= 4)
    masks, reports = walk(parts, samples)
    assert masks == expected and len(reports) == 4
    assert sorted(set(tried)) == [2, 4, 8]
    assert "out of device memory; retrying with 2 samples per forward" in caplog.text
    for name, weight in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], weight, rtol=1e-3, atol=1e-3), name


def test_activations_go_to_the_host_last(samples, monkeypatch, caplog):
    elsewhere = torch.device("cpu", 0)
    full_memory(monkeypatch, lambda replay, batch: replay.settings.cache_dev == CPU)
    model = make_tiny("gqa")
    settings = PruningSettings(CPU, elsewhere)
    plans = plans_of(model, RATIOS, settings)
    masks, _ = prune_layers(model, find_family(model.config), samples, plans, settings)
    assert masks == walk(make_tiny("gqa"), samples)[0]
    lines = [line.partition("; ")[2] for line in caplog.messages if "out of device memory" in line]
    sizes = [(4, "cpu:0"), (2, "cpu:0"), (1, "cpu:0"), (1, "cpu")]
    assert lines == [f"retrying with {size} samples per forward, activations on {device}" for size, device in sizes]


def test_memory_that_never_does_is_an_error(samples, monkeypatch):
    full_memory(monkeypatch, lambda replay, batch: False)
    with pytest.raises(torch.OutOfMemoryError):
        walk(make_tiny("gqa"), samples)


@pytest.mark.parametrize("variant", ["gqa", "mixtral"])
def test_the_first_half_of_the_layers_sees_beginnings_of_text_besides(variant, samples, monkeypatch):
    """The Hessian of the first layer is that of both kinds of windows, each as the model itself runs it."""
    model, starts = make_tiny(variant), samples[:9, :8]
    expected, name = [], "self_attn.o_proj"
    linear = model.model.layers[0].get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda module, args: expected.append(args[0].flatten(0, 1)))
    for windows in (samples, starts):
        model(windows)
    handle.remove()
    hessians: dict[str, tuple[torch.Tensor, int]] = {}
    prune = SlimGPT.struct_prune

    def spy(pruner, *args, **flags):
        hessians[pruner.name] = (pruner.hessian.clone(), pruner.num_samples)
        return prune(pruner, *args, **flags)

    monkeypatch.setattr(SlimGPT, "struct_prune", spy)
    settings = PruningSettings(CPU, CPU)
    plans = plans_of(model, RATIOS, settings)
    prune_layers(model, find_family(model.config), samples, plans, settings, starts=starts)
    tokens = torch.cat(expected).double()
    hessian, count = hessians[f"layer 0 {name}"]
    assert count == len(samples) + len(starts)
    assert torch.allclose(hessian.double(), 2 / count * tokens.T @ tokens, rtol=1e-4, atol=1e-6)
    counts = [hessians[f"layer {index} {name}"][1] - len(samples) for index in range(4)]
    assert counts == [len(starts), len(starts), 0, 0]
