"""Masks of a model that is pruned more than once, and ``pruning.json``."""

import json

import pytest
import torch

from slim_utils.common.errors import UserError
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.masks import LayerMask, ModelUnits, read_pruning, read_units, write_pruning, write_units
from slim_utils.params_remove import kept_indices, select_indices, shrink
from tests.tiny_models import ALL_TINY, make_tiny

GROUPED, EXPERTS = LayerShape(6, 3, 4, 8), LayerShape(6, 3, 4, 12, num_experts=3)
SHARED = LayerShape(6, 3, 4, 12, num_experts=3, num_shared_columns=8)


def uneven_masks(shapes: list[LayerShape], unit: str, dense_layer: int) -> list[LayerMask]:
    """Masks that keep other numbers of units in every layer, everything in one, and other columns of every expert."""
    masks = []
    for index, shape in enumerate(shapes):
        if index == dense_layer:
            masks.append(LayerMask.dense(shape))
            continue
        width, size = shape.ffn_width, shape.heads_per_group
        columns = [c for c in range(shape.num_columns) if (c + c // width) % width > 1 + index]
        if unit == "kv_group" or size == 1:
            groups = [
                g for g in range(shape.num_kv_heads) if g != index % shape.num_kv_heads or shape.num_kv_heads == 1
            ]
            masks.append(LayerMask.from_groups(shape, groups, columns))
        else:
            heads = [head for head in range(shape.num_heads) if (head + head // size) % size != index % size]
            masks.append(LayerMask.from_heads(shape, heads, columns))
    return masks


@pytest.mark.parametrize("units", [("kv_group", "query_head"), ("query_head", "kv_group")])
@pytest.mark.parametrize("variant", ALL_TINY)
def test_compose_of_two_prunings_slices_the_dense_weights_to_the_pruned_model(variant, units, tmp_path):
    dense = make_tiny(variant)
    family, shapes = find_family(dense.config), layer_shapes(dense.config)
    once_masks = uneven_masks(shapes, units[0], dense_layer=0)
    once = shrink(dense, family, once_masks)
    twice_masks = uneven_masks(layer_shapes(once.config), units[1], dense_layer=2)
    twice = shrink(once, family, twice_masks)

    before = ModelUnits.unpruned("dense", dense.config.model_type, True, shapes).pruned(once_masks)
    after = before.pruned(twice_masks)
    assert before.shapes == layer_shapes(once.config) and after.shapes == layer_shapes(twice.config)
    norms = [f"{name}.weight" for name, _ in family.head_norms]
    for layer, pruned, mask in zip(
        family.decoder_layers(dense), family.decoder_layers(twice), after.layers, strict=True
    ):
        weights = pruned.state_dict()
        kept = kept_indices(family, mask)
        assert kept.keys() & weights.keys()
        for name, tensor in layer.state_dict().items():
            expected = select_indices(tensor, *kept[name]) if name in kept else tensor
            # Norms over all heads are rescaled to fewer heads.
            assert name in norms or torch.equal(weights[name], expected), name

    write_pruning(tmp_path / "masked.json", before, twice_masks)
    assert read_pruning(tmp_path / "masked.json") == twice_masks
    assert read_units(tmp_path / "masked.json", after.shapes) == after
    assert read_units(tmp_path / "masked.json", before.shapes) == before
    write_units(tmp_path / "pruned.json", after)
    assert read_pruning(tmp_path / "pruned.json") == after.layers
    assert read_units(tmp_path / "pruned.json", after.shapes) == after


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        # Of each kv group, then a group: heads 1, 2, 4 on kv heads 0, 1, 2.
        (
            LayerMask(GROUPED, [1, 2, 4], [0, 1, 2], [0, 3, 5, 7]),
            LayerMask(LayerShape(3, 3, 4, 4), [0, 2], [0, 2], [1, 3]),
            LayerMask(GROUPED, [1, 4], [0, 2], [3, 7]),
        ),
        # A group, then of each kv group.
        (
            LayerMask(GROUPED, [2, 3, 4, 5], [1, 2], [1, 2]),
            LayerMask(LayerShape(4, 2, 4, 2), [1, 2], [0, 1], [1]),
            LayerMask(GROUPED, [3, 4], [1, 2], [2]),
        ),
        # Other columns of every expert.
        (
            LayerMask(EXPERTS, [0, 1], [0], [0, 1, 6, 7, 8, 11]),
            LayerMask(LayerShape(2, 1, 4, 6, num_experts=3), [0, 1], [0], [1, 2, 5]),
            LayerMask(EXPERTS, [0, 1], [0], [1, 6, 11]),
        ),
        # And of the shared expert, which loses twice as many.
        (
            LayerMask(SHARED, [0, 1], [0], [0, 1, 6, 7, 8, 11], [0, 2, 4, 7]),
            LayerMask(LayerShape(2, 1, 4, 6, 3, num_shared_columns=4), [0, 1], [0], [1, 2, 5], [2, 3]),
            LayerMask(SHARED, [0, 1], [0], [1, 6, 11], [4, 7]),
        ),
    ],
)
def test_compose_gives_indices_of_the_first_layer(earlier, later, expected):
    assert earlier.compose(later) == expected
    assert expected.relative_to(earlier) == later
    assert LayerMask.dense(earlier.shape).compose(earlier) == earlier
    assert earlier.compose(LayerMask.dense(earlier.kept_shape)) == earlier


def test_from_groups_without_kept_shared_columns_keeps_as_many_as_go_with_the_columns(tmp_path):
    mask = LayerMask.from_groups(SHARED, [0], [1, 6, 11])
    assert mask.kept_shared == [0, 1] and mask.removed_units()["shared_columns"] == [2, 3, 4, 5, 6, 7]
    assert mask.kept_shape == LayerShape(2, 1, 4, 3, 3, num_shared_columns=2)
    assert LayerMask.dense(SHARED).kept_shared == list(range(8))
    units = ModelUnits.unpruned("tiny", "qwen2_moe", True, [SHARED])
    write_pruning(tmp_path / "pruning.json", units, [mask])
    assert read_pruning(tmp_path / "pruning.json") == [mask]


def test_compose_with_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="for a layer pruned to"):
        LayerMask.dense(GROUPED).compose(LayerMask.dense(EXPERTS))


def test_write_pruning_has_kept_and_removed_units_as_dense_indices(tmp_path):
    units = ModelUnits("tiny", "llama", True, [LayerMask(GROUPED, [1, 2, 4], [0, 1, 2], [0, 3, 5, 7])])
    masks = [LayerMask(LayerShape(3, 3, 4, 4), [0, 2], [0, 2], [1, 3])]
    write_pruning(tmp_path / "masked.json", units, masks)
    write_units(tmp_path / "pruned.json", units.pruned(masks))
    removed = {
        "masked": {"heads": [2], "kv_heads": [1], "columns": [0, 5]},
        "pruned": {"heads": [0, 2, 3, 5], "kv_heads": [1], "columns": [0, 1, 2, 4, 5, 6]},
    }
    for name, expected in removed.items():
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert (content["units_of"], content["model_type"], content["dense"]) == ("tiny", "llama", True)
        (layer,) = content["layers"]
        assert layer["shape"]["num_heads"] == 6
        assert {kind: layer[kind]["kept"] for kind in expected} == {
            "heads": [1, 4],
            "kv_heads": [0, 2],
            "columns": [3, 7],
        }
        assert {kind: layer[kind]["removed"] for kind in expected} == expected


def test_read_units_that_do_not_fit_the_checkpoint_are_refused(tmp_path):
    path = tmp_path / "pruning.json"
    units = ModelUnits.unpruned("tiny", "llama", True, [GROUPED])
    write_pruning(path, units, [LayerMask.dense(GROUPED)])
    with pytest.raises(UserError, match="layer shapes differ from the model's"):
        read_units(path, [EXPERTS])
    content = json.loads(path.read_text())
    del content["units_of"]
    path.write_text(json.dumps(content))
    assert read_pruning(path) == [LayerMask.dense(GROUPED)]
    with pytest.raises(UserError, match=r"pruning.json: of an earlier version of this suite"):
        read_units(path, [GROUPED])
    with pytest.raises(UserError, match="no such file"):
        read_units(tmp_path / "none.json", [GROUPED])
