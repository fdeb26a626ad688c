"""Measured latency tables, with a clock that counts the weights of the linear maps that were run."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from slim_utils.allocation import latency_measurement
from slim_utils.allocation.latency_measurement import curve_points, layer_kinds, measure_latency_table
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.masks import LayerPlan
from slim_utils.profiling.latency_table import TimedRequest
from slim_utils.profiling.model_stats import model_stats
from slim_utils.pruned_config import slim_config
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
REQUEST = TimedRequest(2, 8, 3)


@pytest.fixture
def counting_clock(monkeypatch):
    """A clock that shows the weights of the linear maps that have been run, in all of a process."""
    counter = [0.0]

    def count(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.Linear):
            counter[0] += module.weight.numel()

    monkeypatch.setattr(latency_measurement.time, "perf_counter", lambda: counter[0])
    handle = register_module_forward_hook(count)
    yield
    handle.remove()


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 40, 11008])
def test_curve_points_end_with_all_units(total):
    points = curve_points(total)
    assert points[-1] == total and points == sorted(set(points)) and points[0] >= 1
    assert len(points) == min(total, 8)
    aligned = curve_points(total, 8)
    assert aligned[-1] == total and not any(point % 8 for point in aligned[:-1]) and aligned == sorted(set(aligned))


@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
@pytest.mark.parametrize("name", ["gqa", "mha", "phi3", "opt", "gemma3_text"])
def test_table_counts_the_weights_of_each_part(counting_clock, name, unit):
    config = make_tiny(name).config
    table = measure_latency_table(config, torch.float32, CPU, REQUEST, unit, repeats=1)
    assert sorted(index for kind in table.kinds for index in kind.layers) == [0, 1, 2, 3]
    shape, hidden = layer_shapes(config)[0], 24
    groups, size = shape.num_kv_heads, shape.head_dim * hidden
    for kind in table.kinds:
        for kept, phases in zip(kind.heads.kept, kind.heads.seconds, strict=True):
            by_query_head = unit == "query_head" and shape.heads_per_group > 1
            queries, kv_heads = (kept * groups, groups) if by_query_head else (kept * shape.heads_per_group, kept)
            assert phases.prefill == phases.decode == 2 * (queries + kv_heads) * size
        for kept, phases in zip(kind.columns.kept, kind.columns.seconds, strict=True):
            assert phases.prefill == phases.decode == (2 if name == "opt" else 3) * kept * hidden
    assert table.rest.prefill == table.rest.decode == 64 * hidden


def test_table_of_experts_and_dense_layers_has_a_kind_for_each():
    table = measure_latency_table(make_tiny("qwen3_moe").config, torch.float32, CPU, REQUEST, repeats=1)
    assert [kind.layers for kind in table.kinds] == [[0, 2, 3], [1]]
    assert [kind.columns.kept for kind in table.kinds] == [[8, 16, 20], [5, 10, 15, 20, 25, 30, 35, 40]]


def test_table_of_a_pruned_model_reaches_from_its_widest_layer(counting_clock):
    dense = make_tiny("gqa").config
    family, settings = find_family(dense), PruningSettings(CPU, CPU)
    plans = [LayerPlan(2, 0), LayerPlan(0, 8), LayerPlan(2, 20), LayerPlan(4, 30)]
    masks = [settings.size_mask(shape, plan) for shape, plan in zip(layer_shapes(dense), plans, strict=True)]
    pruned = slim_config(dense, family, masks)
    kinds = layer_kinds(pruned, settings)
    # One head is left of each kv group of the last layer, which has no query heads to remove.
    assert [kind.layers for kind in kinds] == [[0, 1, 2], [3]]
    table = measure_latency_table(pruned, torch.float32, CPU, REQUEST, repeats=1)
    assert [(kind.heads.kept[-1], kind.columns.kept[-1]) for kind in table.kinds] == [(3, 40), (2, 10)]
    kept = [(2, 40), (3, 32), (2, 20), (2, 10)]
    seconds = table.rest_seconds("prefill") + sum(
        table.head_seconds(index, heads, "prefill") + table.column_seconds(index, columns, "prefill")
        for index, (heads, columns) in enumerate(kept)
    )
    # Attention scores are not linear maps; the embedding is not run.
    one_token = model_stats(pruned, 1)
    scores = sum(2 * layer.shape.num_heads * layer.shape.head_dim for layer in one_token.layers)
    assert seconds == one_token.macs - scores


def test_models_of_the_points_leave_no_hooks_and_times_are_positive():
    table = measure_latency_table(make_tiny("gqa").config, torch.bfloat16, CPU, REQUEST, repeats=2)
    assert table.dtype == "bfloat16"
    for part in (table.kinds[0].heads, table.kinds[0].columns):
        for name in ("prefill", "decode"):
            times = [getattr(phases, name) for phases in part.seconds]
            assert times[0] > 0 and times == sorted(times)


def test_layers_without_attention_have_all_of_their_time_in_the_rest():
    config = make_tiny("qwen3_5_text").config
    table = measure_latency_table(config, torch.float32, torch.device("cpu"), TimedRequest(1, 4, 1), repeats=1)
    mixer, attention = sorted(table.kinds, key=lambda kind: kind.layers)
    assert (mixer.layers, attention.layers) == ([0, 2], [1, 3])
    assert mixer.heads.kept == [0] and len(attention.heads.kept) > 1
    assert mixer.heads.seconds[0].prefill < 0.1 * mixer.columns.seconds[-1].prefill


def test_layers_of_a_single_block_have_its_time_in_the_heads_or_in_the_rest():
    config = make_tiny("nemotron_h").config
    table = measure_latency_table(config, torch.float32, torch.device("cpu"), TimedRequest(1, 4, 1), repeats=1)
    mixer, attention, ffn, experts = sorted(table.kinds, key=lambda kind: kind.layers)
    assert mixer.heads.kept == mixer.columns.kept == [0]
    assert len(attention.heads.kept) > 1 and attention.columns.kept == [0]
    assert ffn.heads.kept == [0] and ffn.columns.kept[-1] == 40 and experts.columns.kept == [8, 16]
    assert attention.heads.seconds[-1].prefill > attention.columns.seconds[0].prefill
    for kind in (mixer, ffn, experts):
        assert kind.heads.seconds[0].prefill < 0.1 * kind.columns.seconds[-1].prefill
