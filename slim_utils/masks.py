"""Masks: the kept and removed units of every layer, saved as data and never inferred from zeros."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slim_utils.common.errors import UserError, error_reason
from slim_utils.families import COLUMNS, HEADS, KV_HEADS, SHARED_COLUMNS, Family, LayerShape

FORMAT_VERSION = 1
PRUNING_FILE = "pruning.json"


@dataclass(frozen=True)
class LayerPlan:
    """Number of units to remove from one decoder layer.

    Attributes:
        heads: query heads: the same number from every kv group, or all heads of some kv groups.
        columns: columns of the FFN, or of each expert that stays; a shared expert loses ``shared_per_column`` of its
            columns with each.
        experts: whole experts.
    """

    heads: int = 0
    columns: int = 0
    experts: int = 0

    def __bool__(self) -> bool:
        """Return whether anything is removed."""
        return bool(self.heads or self.columns or self.experts)


def columns_by_ffn(shape: LayerShape, columns: list[int]) -> list[list[int]]:
    """Return ``columns`` of a layer by expert, relative to the expert; one list for a dense FFN."""
    by_ffn: list[list[int]] = [[] for _ in range(shape.num_ffns)]
    for column in columns:
        by_ffn[column // shape.ffn_width].append(column % shape.ffn_width)
    return by_ffn


def _others(units: list[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(units))


@dataclass(frozen=True)
class LayerMask:
    """Kept units of one decoder layer, as ascending indices into its original heads, kv heads and FFN columns.

    An expert that keeps no column is removed as a whole. ``kept_shared`` are the kept columns of the shared expert.

    Raises:
        ValueError: if the experts keep different numbers of columns.
    """

    shape: LayerShape
    kept_heads: list[int]
    kept_kv_heads: list[int]
    kept_columns: list[int]
    kept_shared: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len({len(columns) for columns in self.columns_by_ffn() if columns}) > 1:
            raise ValueError("experts with different numbers of columns")

    @classmethod
    def dense(cls, shape: LayerShape) -> "LayerMask":
        """Return the mask that keeps everything."""
        return cls.from_groups(shape, list(range(shape.num_kv_heads)), list(range(shape.num_columns)))

    @classmethod
    def from_groups(
        cls, shape: LayerShape, kept_groups: list[int], kept_columns: list[int], kept_shared: list[int] | None = None
    ) -> "LayerMask":
        """Return the mask that keeps whole kv groups: a key/value head and all query heads that share it.

        Without ``kept_shared``, the shared expert keeps the first of its columns, as many as go with ``kept_columns``.
        """
        size = shape.heads_per_group
        heads = [group * size + i for group in kept_groups for i in range(size)]
        mask = cls(shape, heads, kept_groups, kept_columns)
        return replace(mask, kept_shared=mask._first_shared() if kept_shared is None else kept_shared)

    @classmethod
    def from_heads(
        cls, shape: LayerShape, kept_heads: list[int], kept_columns: list[int], kept_shared: list[int] | None = None
    ) -> "LayerMask":
        """Return the mask that keeps query heads and the key/value heads that they use.

        Without ``kept_shared`` as :meth:`from_groups`.

        Raises:
            ValueError: if the kv heads keep different numbers of query heads, or the blocks of heads do.
        """
        kept_groups = [head // shape.heads_per_group for head in kept_heads]
        groups = sorted(set(kept_groups))
        if len({kept_groups.count(group) for group in groups}) > 1:
            raise ValueError("kv heads with different numbers of query heads")
        blocks = [head * shape.head_blocks // shape.num_heads for head in kept_heads]
        if len({blocks.count(block) for block in range(shape.head_blocks)}) > 1:
            raise ValueError(f"{shape.head_blocks} blocks with different numbers of heads")
        mask = cls(shape, kept_heads, groups, kept_columns)
        return replace(mask, kept_shared=mask._first_shared() if kept_shared is None else kept_shared)

    def _first_shared(self) -> list[int]:
        """The first columns of the shared expert, as many as are left with the columns of the experts."""
        return list(range(self.shape.num_shared_columns - self.plan.columns * self.shape.shared_per_column))

    def removed_units(self) -> dict[str, list[int]]:
        """Return the removed units by kind."""
        shape = self.shape
        totals = {HEADS: shape.num_heads, KV_HEADS: shape.num_kv_heads}
        totals |= {COLUMNS: shape.num_columns, SHARED_COLUMNS: shape.num_shared_columns}
        return {kind: _others(units, totals[kind]) for kind, units in self.kept_units().items()}

    def kept_units(self) -> dict[str, list[int]]:
        """Return the kept units by kind, those of the shared expert where there is one."""
        units = {HEADS: self.kept_heads, KV_HEADS: self.kept_kv_heads, COLUMNS: self.kept_columns}
        return units | ({SHARED_COLUMNS: self.kept_shared} if self.shape.num_shared_columns else {})

    @property
    def kept_shape(self) -> LayerShape:
        """Sizes of the layer without its removed units."""
        return replace(
            self.shape,
            num_heads=len(self.kept_heads),
            num_kv_heads=len(self.kept_kv_heads),
            num_columns=len(self.kept_columns),
            num_experts=len(self.kept_experts),
            num_shared_columns=len(self.kept_shared),
        )

    def compose(self, later: "LayerMask") -> "LayerMask":
        """Return the mask that keeps what is left when ``later`` prunes the layer that this mask pruned.

        Raises:
            ValueError: if ``later`` is a mask of another shape.
        """
        if later.shape != self.kept_shape:
            raise ValueError(f"a mask of {later.shape} for a layer pruned to {self.kept_shape}")
        kept = later.kept_units()
        return LayerMask(self.shape, *([units[i] for i in kept[kind]] for kind, units in self.kept_units().items()))

    def relative_to(self, earlier: "LayerMask") -> "LayerMask":
        """Return the mask of the layer pruned by ``earlier`` that keeps the units of this one: undo :meth:`compose`."""
        relative = []
        for kind, units in earlier.kept_units().items():
            positions = {unit: position for position, unit in enumerate(units)}
            relative.append([positions[unit] for unit in self.kept_units()[kind]])
        return LayerMask(earlier.kept_shape, *relative)

    def columns_by_ffn(self) -> list[list[int]]:
        """Return the kept columns of every expert, relative to the expert; one list for a dense FFN."""
        return columns_by_ffn(self.shape, self.kept_columns)

    @property
    def kept_experts(self) -> list[int]:
        """The experts that are not removed as a whole; empty for a dense FFN."""
        if not self.shape.num_experts:
            return []
        return [index for index, columns in enumerate(self.columns_by_ffn()) if columns]

    @property
    def kept_width(self) -> int:
        """Kept columns of the FFN, or of each kept expert."""
        return len(self.kept_columns) // (len(self.kept_experts) or 1)

    @property
    def plan(self) -> LayerPlan:
        """Number of removed units."""
        return LayerPlan(
            heads=self.shape.num_heads - len(self.kept_heads),
            columns=self.shape.ffn_width - self.kept_width,
            experts=self.shape.num_experts - len(self.kept_experts),
        )

    def removed_share(self) -> tuple[float, float]:
        """Return the removed fraction of the query heads and of the FFN columns; 0 where there are none."""
        heads, columns = self.shape.num_heads, self.shape.num_columns
        return (
            1 - len(self.kept_heads) / heads if heads else 0.0,
            1 - len(self.kept_columns) / columns if columns else 0.0,
        )


@dataclass(frozen=True)
class ModelUnits:
    """Units of a model as indices into those of the dense model that it was pruned from.

    Attributes:
        model: public name of the dense model.
        model_type: its model type.
        is_dense: whether ``model`` is dense; if earlier pruning runs are not recorded, it is a pruned model itself.
        layers: units of every layer, as a mask of the layer of ``model``.
    """

    model: str
    model_type: str
    is_dense: bool
    layers: list[LayerMask]

    @classmethod
    def unpruned(cls, model: str, model_type: str, is_dense: bool, shapes: list[LayerShape]) -> "ModelUnits":
        """Return all units of a model with these layer shapes."""
        return cls(model, model_type, is_dense, [LayerMask.dense(shape) for shape in shapes])

    @property
    def shapes(self) -> list[LayerShape]:
        """Layer shapes of the model that has these units."""
        return [layer.kept_shape for layer in self.layers]

    def pruned(self, masks: list[LayerMask]) -> "ModelUnits":
        """Return the units that are left when ``masks`` prune the model that has these."""
        return replace(self, layers=[layer.compose(mask) for layer, mask in zip(self.layers, masks, strict=True)])


def pruning_to_json(units: ModelUnits, masks: list[LayerMask]) -> dict[str, Any]:
    """Return the content of ``pruning.json``: kept and removed units of each kind per layer, as dense indices.

    In mixtures of experts, ``experts`` lists the experts kept and those removed as a whole, with all their columns.

    Args:
        units: units of the masked model.
        masks: masks of its layers.
    """
    layers = []
    for index, (layer, mask) in enumerate(zip(units.layers, masks, strict=True)):
        kept, removed = layer.compose(mask).kept_units(), mask.removed_units()
        kinds = {
            kind: {"kept": kept[kind], "removed": [units_of_kind[i] for i in removed[kind]]}
            for kind, units_of_kind in layer.kept_units().items()
        }
        if layer.shape.num_experts:
            kept_experts, experts = layer.compose(mask).kept_experts, layer.kept_experts
            kinds["experts"] = {"kept": kept_experts, "removed": sorted(set(experts) - set(kept_experts))}
        layers.append({"layer": index, "shape": asdict(layer.shape), **kinds})
    head = {"format": FORMAT_VERSION, "model_type": units.model_type, "units_of": units.model}
    return {**head, "dense": units.is_dense, "layers": layers}


def write_pruning(path: Path, units: ModelUnits, masks: list[LayerMask]) -> None:
    """Write the ``pruning.json`` of a masked model, one line per layer; arguments as for :func:`pruning_to_json`."""
    content = pruning_to_json(units, masks)
    layers = ",\n".join(json.dumps(layer) for layer in content.pop("layers"))
    head = json.dumps(content)[:-1]
    path.write_text(f'{head}, "layers": [\n{layers}\n]}}\n', encoding="utf-8")


def write_units(path: Path, units: ModelUnits) -> None:
    """Write the ``pruning.json`` of the pruned model that has ``units``: masks of the dense model."""
    dense = ModelUnits.unpruned(units.model, units.model_type, units.is_dense, [mask.shape for mask in units.layers])
    write_pruning(path, dense, units.layers)


def read_pruning(path: Path) -> list[LayerMask]:
    """Return the masks of all layers in a ``pruning.json``, relative to the units of the masked model.

    Raises:
        UserError: if the file is missing or has another format.
    """
    with _read_errors(path):
        return [kept.relative_to(units) for kept, units in map(_read_layer, _read_content(path)["layers"])]


def read_units(path: Path, shapes: list[LayerShape] | None = None) -> ModelUnits:
    """Return the units of the checkpoint beside a ``pruning.json``, masked or pruned.

    Args:
        path: the file.
        shapes: layer shapes of the checkpoint; ``None`` for a pruned model.

    Raises:
        UserError: if the file is missing, has another format, or is not of such a checkpoint.
    """
    with _read_errors(path):
        content = _read_content(path)
        kept, units = zip(*map(_read_layer, content["layers"]), strict=True)
        if "units_of" not in content:
            raise UserError(f"{path}: of an earlier version of this suite, without the units of the dense model")
        for layers in (kept, units):
            model_units = ModelUnits(content["units_of"], content["model_type"], content["dense"], list(layers))
            if shapes is None or model_units.shapes == shapes:
                return model_units
    raise UserError(f"{path}: layer shapes differ from the model's")


def _read_content(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT_VERSION:
        raise UserError(f"{path}: format {content['format']}, this version reads format {FORMAT_VERSION}")
    return content


def _read_layer(layer: dict[str, Any]) -> tuple[LayerMask, LayerMask]:
    """Return the kept units of a layer, and all units of the masked model, as masks of the dense layer."""
    shape = LayerShape(**layer["shape"])
    rows = [layer[kind] for kind in LayerMask.dense(shape).kept_units()]
    kept = LayerMask(shape, *(row["kept"] for row in rows))
    return kept, LayerMask(shape, *(sorted(row["kept"] + row["removed"]) for row in rows))


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn errors of a missing or damaged ``pruning.json`` into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a pruning.json of this suite ({error_reason(error)})") from None


def read_masks(path: Path, family: Family, shapes: list[LayerShape]) -> list[LayerMask]:
    """Return the masks in a ``pruning.json``, the folder of one, or a mask file of the original.

    A mask file of the original maps the name of each o_proj and down_proj weight to the removed heads and columns.

    Args:
        path: file or folder.
        family: row of the table of families.
        shapes: layer shapes of the masked model.

    Raises:
        UserError: if the file cannot be read, the layer shapes differ, or whole experts are removed.
    """
    path = path / PRUNING_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--mask_config_dir {path}: cannot be read ({error_reason(error)})") from None
    if "format" in content:
        masks = read_pruning(path)
    else:
        masks = [_original_mask(content, family, index, shape, path) for index, shape in enumerate(shapes)]
    if [mask.shape for mask in masks] != shapes:
        raise UserError(
            f"{path}: layer shapes differ from the model's; give the masked model (save_dir/), not the pruned model"
        )
    if any(mask.plan.experts for mask in masks):
        raise UserError(f"{path}: removes whole experts, which zeros cannot mask; train the pruned model without masks")
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
