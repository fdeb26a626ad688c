"""Which units of each layer were kept and removed: data that is saved, never guessed from zeros."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from slim_utils.errors import UserError
from slim_utils.families import LayerShape

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerMask:
    """Kept units of one decoder layer, as ascending indices into its original heads, kv heads and FFN columns."""

    shape: LayerShape
    kept_heads: list[int]
    kept_kv_heads: list[int]
    kept_columns: list[int]

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

    def removed_share(self) -> tuple[float, float]:
        """Removed share of the query heads and of the FFN columns."""
        heads = 1 - len(self.kept_heads) / self.shape.num_heads
        return heads, 1 - len(self.kept_columns) / self.shape.num_columns


def pruning_to_json(masks: list[LayerMask], model_type: str) -> dict:
    """The content of ``pruning.json``: per layer, its shape and the kept and removed indices of each kind of unit."""
    layers = []
    for index, mask in enumerate(masks):
        units = {
            "heads": (mask.kept_heads, mask.shape.num_heads),
            "kv_heads": (mask.kept_kv_heads, mask.shape.num_kv_heads),
            "columns": (mask.kept_columns, mask.shape.num_columns),
        }
        layer = {"layer": index, "shape": asdict(mask.shape)}
        for name, (kept, total) in units.items():
            layer[name] = {"kept": kept, "removed": sorted(set(range(total)) - set(kept))}
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
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a pruning.json of this suite ({type(error).__name__}: {error})") from None
