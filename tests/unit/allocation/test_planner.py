"""Plans of all layers from a configuration."""

from slim_utils.allocation.planner import Planner
from slim_utils.families import find_family
from slim_utils.layerwise.offload import ResidentModel
from slim_utils.masks import LayerPlan
from slim_utils.pruning_config import PruningConfig
from tests.tiny_models import make_tiny


def planner(name: str, **flags) -> Planner:
    model, config = make_tiny(name), PruningConfig(device="cpu", cache_dev="cpu", **flags)
    return Planner(config, ResidentModel(model, find_family(model.config)))


def test_plans_of_ratios_are_counts_of_query_heads_and_columns():
    # Six query heads on two kv heads, 40 columns: one of the three heads of each kv head.
    assert planner("gqa", sparsity=0.3).plans() == [LayerPlan(2, 12)] * 4
    assert planner("gqa", sparsity=0.3, gqa_unit="kv_group").plans() == [LayerPlan(3, 12)] * 4
    assert planner("mha", sparsity=0.5, minlayer=1, maxlayer=3).plans() == [
        LayerPlan(),
        LayerPlan(3, 20),
        LayerPlan(3, 20),
        LayerPlan(),
    ]


def test_plans_at_a_high_ratio_keep_the_last_unit():
    assert planner("gqa", sparsity=0.99).plans() == [LayerPlan(4, 39)] * 4


def test_plans_aligned_at_a_ratio_of_zero_units_keep_multiples():
    assert planner("mha", sparsity=0.01, multiple_of=16).plans()[0].columns == 8
