"""Alignment of plans to multiples of units."""

import random

import pytest

from slim_utils.allocation.alignment import Alignment, aligned_counts
from slim_utils.allocation.budget import LayerUnits
from slim_utils.masks import LayerPlan


@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_aligned_counts_of_all_layers_keeps_the_sum(multiple, seed):
    generator = random.Random(seed)
    totals = [160] * 9
    removed = [0 if generator.random() < 0.2 else generator.randint(8, 96) for _ in totals]
    aligned = aligned_counts(removed, totals, [multiple] * len(totals), [count > 0 for count in removed])
    for before, after in zip(removed, aligned, strict=True):
        assert (160 - after) % multiple == 0 if before else after == 0
        assert abs(after - before) < multiple
    assert 0 <= sum(aligned) - sum(removed) < multiple


def test_aligned_counts_small_layers_are_kept():
    assert aligned_counts([14, 14], [16, 16], [8, 8], [True, True]) == [8, 8]
    assert aligned_counts([1, 0], [3, 3], [4, 4], [True, False]) == [1, 0]


def test_aligned_counts_pruned_layer_with_zero_units_is_aligned():
    assert aligned_counts([0, 0], [9, 9], [2, 2], [True, False]) == [1, 0]


def test_aligned_counts_uniform_drops_left_over_multiples():
    assert len(set(aligned_counts([9] * 4, [36] * 4, [8] * 4, [True] * 4))) == 2
    assert aligned_counts([9] * 4, [36] * 4, [8] * 4, [True] * 4, uniform=True) == [12] * 4


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.11, 0.3])
def test_aligned_uniform_layers_of_twice_the_width_lose_twice_the_columns(ratio, multiple):
    """6144 and 12288 columns, 10 % of which are 614 and 1229."""
    units = [LayerUnits(4, columns, 1, 1) for columns in (6144, 6144, 12288)]
    plans = [LayerPlan(0, round(ratio * layer.columns)) for layer in units]
    alignment = Alignment(columns_multiple=multiple, uniform=True)
    narrow, other, wide = alignment.aligned(plans, units, [(False, True)] * 3)
    assert narrow == other and wide.columns == 2 * narrow.columns
    assert (6144 - narrow.columns) % multiple == 0


def test_aligned_uniform_layers_of_another_ratio_keep_it():
    units = [LayerUnits(4, columns, 1, 1) for columns in (64, 64, 128)]
    plans = [LayerPlan(0, columns) for columns in (16, 16, 64)]
    assert Alignment(uniform=True).aligned(plans, units, [(False, True)] * 3) == plans
    assert Alignment(uniform=True).aligned(plans, units, [(False, True), (False, True), (False, False)]) == plans


def test_aligned_experts_do_not_compensate_for_a_dense_ffn():
    units = [LayerUnits(4, 40, 1, 1, num_experts=experts) for experts in (0, 8, 8)]
    plans = Alignment(columns_multiple=16).aligned([LayerPlan(0, 12)] * 3, units, [(False, True)] * 3)
    # Each layer keeps 28 columns: the dense FFN is rounded down to 16, the two MoE layers to 32 and 16.
    assert [plan.columns for plan in plans] == [24, 8, 24]


@pytest.mark.parametrize(("groups", "kept"), [(1, 2), (3, 2), (2, 3)])
def test_aligned_heads_multiple_includes_the_groups_of_a_unit(groups, kept):
    """A unit of three groups is three heads: an even number of heads needs an even number of units."""
    units = [LayerUnits(4, 40, 1, 1, heads_per_unit=groups, head_groups=groups)]
    plan = LayerPlan(groups, 0)
    (aligned,) = Alignment(heads_multiple=2).aligned([plan], units, [(True, False)])
    assert 4 - aligned.heads // groups == kept
