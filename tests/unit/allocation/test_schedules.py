"""Schedules of the incremental pruning ratio."""

import math

import pytest

from slim_utils.allocation.schedules import STRATEGIES, layer_range, layer_ratios, non_uniform_ratios
from slim_utils.common.errors import UserError


def test_non_uniform_ratios_log_increase_of_32_layers_is_the_papers():
    ratios = non_uniform_ratios("log_increase", 0.0625, 0.25, 32)
    assert ratios == pytest.approx([0.0625 + (0.25 - 0.0625) * math.log(1 + i) / math.log(32) for i in range(32)])
    assert sum(ratios) / 32 == pytest.approx(0.2004, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [2, 30, 80])
def test_non_uniform_ratios_ends_and_order(strategy, count):
    ratios = non_uniform_ratios(strategy, 0.1, 0.4, count)
    assert len(ratios) == count
    assert sorted(ratios, reverse=strategy.endswith("decrease")) == ratios
    assert (min(ratios), max(ratios)) == pytest.approx((0.1, 0.4))


def test_non_uniform_ratios_linear_increase():
    assert non_uniform_ratios("linear_increase", 0.0, 0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_non_uniform_ratios_of_one_layer_is_the_highest():
    assert non_uniform_ratios("log_increase", 0.1, 0.3, 1) == [0.3]


def test_layer_ratios_outside_the_range_are_zero():
    layers = layer_range(2, 1000, 6)
    ratios = layer_ratios(layers, 6, non_uniform_ratios("linear_decrease", 0.1, 0.4, len(layers)))
    assert ratios == pytest.approx([0, 0, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("minlayer", "maxlayer", "expected"), [(-1, 1000, range(0, 6)), (0, 32, range(0, 6)), (2, 4, range(2, 4))]
)
def test_layer_range_is_clipped_to_the_model(minlayer, maxlayer, expected):
    assert layer_range(minlayer, maxlayer, 6) == expected


def test_schedules_errors_name_the_flag():
    with pytest.raises(UserError, match="--minlayer 9"):
        layer_range(9, 12, 6)
    with pytest.raises(UserError, match="--non_uniform_strategy cubic"):
        non_uniform_ratios("cubic", 0, 0.1, 3)
