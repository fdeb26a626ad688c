"""Which units of each layer were kept and removed: data that is saved, never guessed from zeros."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from slim_utils.common.errors import UserError
from slim_utils.families import Family, LayerShape

FORMAT_VERSION = 1
PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class LayerPlan:
    """What is removed of one decoder layer, in whole counts.

    Attributes:
        heads: query heads: equally many of every kv group, or all those of some kv groups.
        columns: columns of the FFN, or of each of its experts.
    """

    heads: int = 0
    columns: int = 0

    def __bool__(self) -> bool:
        """Whether anything is removed."""
        return bool(self.heads or self.columns)


def _others(units: list[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(units))


@dataclass(frozen=True)
class LayerMask:
    """Kept units of one decoder layer, as ascending indices into its original heads, kv heads and FFN columns.

    Raises:
        ValueError: if experts would be left with unequally many columns.
    """

    shape: LayerShape
    kept_heads: list[int]
    kept_kv_heads: list[int]
    kept_columns: list[int]

    def __post_init__(self) -> None:
        if len(set(map(len, self.columns_by_ffn()))) > 1:
            raise ValueError("experts with unequally many columns")

    @classmethod
    def dense(cls, shape: LayerShape) -> "LayerMask":
        """The mask that keeps everything."""
        return cls.from_groups(shape, list(range(shape.num_kv_heads)), list(range(shape.num_columns)))

    @classmethod
    def from_groups(cls, shape: LayerShape, kept_groups: list[int], kept_columns: list[int]) -> "LayerMask":
        """Keep whole kv groups: a key/value head and all the query heads that share it."""
        size = shape.heads_per_group
        heads = [group * size + i for group in kept_groups for i in range(size)]
        return cls(shape, heads, kept_groups, kept_columns)

    @classmethod
    def from_heads(cls, shape: LayerShape, kept_heads: list[int], kept_columns: list[int]) -> "LayerMask":
        """Keep these query heads, and the key/value heads that any of them needs.

        Raises:
            ValueError: if kv heads would be left with unequally many query heads.
        """
        kept_groups = [head // shape.heads_per_group for head in kept_heads]
        groups = sorted(set(kept_groups))
        if len({kept_groups.count(group) for group in groups}) > 1:
            raise ValueError("kv heads with unequally many query heads")
        return cls(shape, kept_heads, groups, kept_columns)

    def removed(self) -> "LayerMask":
        """The mask that keeps what this one removes."""
        shape = self.shape
        return LayerMask(
            shape,
            _others(self.kept_heads, shape.num_heads),
            _others(self.kept_kv_heads, shape.num_kv_heads),
            _others(self.kept_columns, shape.num_columns),
        )

    def columns_by_ffn(self) -> list[list[int]]:
        """Kept columns of every expert, counted in each from 0; of an ordinary FFN, one list."""
        width = self.shape.ffn_width
        kept: list[list[int]] = [[] for _ in range(self.shape.num_ffns)]
        for column in self.kept_columns:
            kept[column // width].append(column % width)
        return kept

    @property
    def kept_width(self) -> int:
        """Columns that the FFN, or each of its experts, keeps."""
        return len(self.kept_columns) // self.shape.num_ffns

    @property
    def plan(self) -> LayerPlan:
        """How much is removed."""
        return LayerPlan(self.shape.num_heads - len(self.kept_heads), self.shape.ffn_width - self.kept_width)

    def removed_share(self) -> tuple[float, float]:
        """Removed share of the query heads and of the FFN columns."""
        heads = 1 - len(self.kept_heads) / self.shape.num_heads
        return heads, 1 - len(self.kept_columns) / self.shape.num_columns


def pruning_to_json(masks: list[LayerMask], model_type: str) -> dict:
    """The content of ``pruning.json``: per layer, its shape and the kept and removed indices of each kind of unit."""
    layers = []
    for index, mask in enumerate(masks):
        removed = mask.removed()
        layer = {"layer": index, "shape": asdict(mask.shape)}
        for name in ("heads", "kv_heads", "columns"):
            layer[name] = {"kept": getattr(mask, f"kept_{name}"), "removed": getattr(removed, f"kept_{name}")}
        layers.append(layer)
    return {"format": FORMAT_VERSION, "model_type": model_type, "layers": layers}


def write_pruning(path: Path, masks: list[LayerMask], model_type: str) -> None:
    """Write ``pruning.json``, a line a layer."""
    content = pruning_to_json(masks, model_type)
    layers = ",\n".join(json.dumps(layer) for layer in content.pop("layers"))
    head = json.dumps(content)[:-1]
    path.write_text(f'{head}, "layers": [\n{layers}\n]}}\n', encoding="utf-8")


def read_pruning(path: Path) -> list[LayerMask]:
    """Masks of every layer from a ``pruning.json``.

    Raises:
        UserError: if the file is missing or not of this format.
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
    """Masks of a model of ``shapes``, from a ``pruning.json``, its folder, or a mask file of the original.

    The original's json maps the name of each o_proj and down_proj weight to the removed heads and columns.

    Raises:
        UserError: if there is no such file, or it is of a model of other shapes.
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
            f"{path}: the masks are of a model of other shapes; give the zeroed model (save_dir/), not a small one"
        )
    return masks


def _original_mask(content: dict, family: Family, index: int, shape: LayerShape, path: Path) -> LayerMask:
    """One layer of the original's mask file."""
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
