"""Settings of a run in its checkpoints."""

from slim_utils.families import LayerShape
from slim_utils.masks import LayerMask
from train_utils.resumption import masks_hash

SHAPE = LayerShape(num_heads=4, num_kv_heads=2, head_dim=4, num_columns=3)


def test_masks_hash_stays_the_same_across_versions():
    masks = [LayerMask(SHAPE, [0, 2], [0, 1], [1, 2]), LayerMask.dense(SHAPE)]
    # Stored in the checkpoints of earlier versions.
    assert masks_hash(masks) == "711eec220e5e14a4"
    assert masks_hash(masks[::-1]) != masks_hash(masks)
    assert masks_hash([LayerMask(SHAPE, [0, 2], [0, 1], [0, 2]), masks[1]]) != masks_hash(masks)
