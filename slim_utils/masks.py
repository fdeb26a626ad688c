"""Masks: the kept and removed units of every layer, saved as data and never inferred from zeros."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from slim_utils.common.errors import UserError
from slim_utils.families import Family, LayerShape

FORMAT_VERSION = 1
PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class LayerPlan:
    """Number of units to remove from one decoder layer.

    Attributes:
        heads: query heads: the same number from every kv group, or all heads of some kv groups.
        columns: columns of the FFN, or of each expert.
    """

    heads: int = 0
    columns: int = 0

    def __bool__(self) -> bool:
        """Return whether anything is removed."""
        return bool(self.heads or self.columns)


def _others(units: list[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(units))


@dataclass(frozen=True)
class LayerMask:
    """Kept units of one decoder layer, as ascending indices into its original heads, kv heads and FFN columns.

    Raises:
        ValueError: if the experts keep different numbers of columns.
    """

    shape: LayerShape
    kept_heads: list[int]
    kept_kv_heads: list[int]
    kept_columns: list[int]

    def __post_init__(self) -> None:
        if len(set(map(len, self.columns_by_ffn()))) > 1:
            raise ValueError("experts with different numbers of columns")

    @classmethod
    def dense(cls, shape: LayerShape) -> "LayerMask":
        """Return the mask that keeps everything."""
        return cls.from_groups(shape, list(range(shape.num_kv_heads)), list(range(shape.num_columns)))

    @classmethod
    def from_groups(cls, shape: LayerShape, kept_groups: list[int], kept_columns: list[int]) -> "LayerMask":
        """Return the mask that keeps whole kv groups: a key/value head and all query heads that share it."""
        size = shape.heads_per_group
        heads = [group * size + i for group in kept_groups for i in range(size)]
        return cls(shape, heads, kept_groups, kept_columns)

    @classmethod
    def from_heads(cls, shape: LayerShape, kept_heads: list[int], kept_columns: list[int]) -> "LayerMask":
        """Return the mask that keeps query heads and the key/value heads that they use.

        Raises:
            ValueError: if the kv heads keep different numbers of query heads.
        """
        kept_groups = [head // shape.heads_per_group for head in kept_heads]
        groups = sorted(set(kept_groups))
        if len({kept_groups.count(group) for group in groups}) > 1:
            raise ValueError("kv heads with different numbers of query heads")
        return cls(shape, kept_heads, groups, kept_columns)

    def removed(self) -> "LayerMask":
        """Return the mask that keeps the units that this one removes."""
        shape = self.shape
        return LayerMask(
            shape,
            _others(self.kept_heads, shape.num_heads),
            _others(self.kept_kv_heads, shape.num_kv_heads),
            _others(self.kept_columns, shape.num_columns),
        )

    def columns_by_ffn(self) -> list[list[int]]:
        """Return the kept columns of every expert, relative to the expert; one list for a dense FFN."""
        width = self.shape.ffn_width
        kept: list[list[int]] = [[] for _ in range(self.shape.num_ffns)]
        for column in self.kept_columns:
            kept[column // width].append(column % width)
        return kept

    @property
    def kept_width(self) -> int:
        """Kept columns of the FFN, or of each expert."""
        return len(self.kept_columns) // self.shape.num_ffns

    @property
    def plan(self) -> LayerPlan:
        """Number of removed units."""
        return LayerPlan(self.shape.num_heads - len(self.kept_heads), self.shape.ffn_width - self.kept_width)

    def removed_share(self) -> tuple[float, float]:
        """Return the removed fraction of the query heads and of the FFN columns."""
        heads = 1 - len(self.kept_heads) / self.shape.num_heads
        return heads, 1 - len(self.kept_columns) / self.shape.num_columns


def pruning_to_json(masks: list[LayerMask], model_type: str) -> dict:
    """Return the content of ``pruning.json``: shape, kept and removed indices of each kind of unit, per layer."""
    layers = []
    for index, mask in enumerate(masks):
        removed = mask.removed()
        layer = {"layer": index, "shape": asdict(mask.shape)}
        for name in ("heads", "kv_heads", "columns"):
            layer[name] = {"kept": getattr(mask, f"kept_{name}"), "removed": getattr(removed, f"kept_{name}")}
        layers.append(layer)
    return {"format": FORMAT_VERSION, "model_type": model_type, "layers": layers}


def write_pruning(path: Path, masks: list[LayerMask], model_type: str) -> None:
    """Write ``pruning.json``, one line per layer."""
    content = pruning_to_json(masks, model_type)
    layers = ",\n".join(json.dumps(layer) for layer in content.pop("layers"))
    head = json.dumps(content)[:-1]
    path.write_text(f'{head}, "layers": [\n{layers}\n]}}\n', encoding="utf-8")


def read_pruning(path: Path) -> list[LayerMask]:
    """Return the masks of all layers in a ``pruning.json``.

    Raises:
        UserError: if the file is missing or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_VERSION:
            raise UserError(f"{path}: format {content['format']}, this version reads format {FORMAT_VERSION}")
        return [
            LayerMask(
                LayerShape(**layer["shape"]),
                layer["heads"]["kept"],
                layer["kv_heads"]["kept"],
                layer["columns"]["kept"],
            )
            for layer in content["layers"]
        ]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a pruning.json of this suite ({type(error).__name__}: {error})") from None


def read_masks(path: Path, family: Family, shapes: list[LayerShape]) -> list[LayerMask]:
    """Return the masks in a ``pruning.json``, the folder of one, or a mask file of the original.

    A mask file of the original maps the name of each o_proj and down_proj weight to the removed heads and columns.

    Args:
        path: file or folder.
        family: row of the table of families.
        shapes: layer shapes of the masked model.

    Raises:
        UserError: if the file cannot be read, or the layer shapes differ.
    """
    path = path / PRUNING_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--mask_config_dir {path}: cannot be read ({type(error).__name__}: {error})") from None
    if "format" in content:
        masks = read_pruning(path)
    else:
        masks = [_original_mask(content, family, index, shape, path) for index, shape in enumerate(shapes)]
    if [mask.shape for mask in masks] != shapes:
        raise UserError(
            f"{path}: layer shapes differ from the model's; give the masked model (save_dir/), not the pruned model"
        )
    return masks


def _original_mask(content: dict, family: Family, index: int, shape: LayerShape, path: Path) -> LayerMask:
    """Return the mask of one layer in a mask file of the original."""
    removed: dict[str, list[int]] = {}
    for name, total in ((family.attention_out, shape.num_heads), (family.mlp_out, shape.num_columns)):
        key = f"{family.layers}.{index}.{name}.weight"
        indices = content.get(key)
        if not isinstance(indices, list) or not set(indices) <= set(range(total)):
            raise UserError(f"{path}: {key} is not a list of indices below {total}")
        removed[name] = indices
    heads = removed[family.attention_out]
    try:
        return LayerMask.from_heads(
            shape, _others(heads, shape.num_heads), _others(removed[family.mlp_out], shape.num_columns)
        )
    except ValueError as error:
        raise UserError(f"{path}: layer {index}: removing heads {sorted(heads)} leaves {error}") from None
