"""What the checks run on: a pruned checkpoint of every row of the table, its layers of different shapes."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models.families import FAMILIES, ROWS
from slim_utils.families import LayerShape, find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.library.exceptions import EXCEPTIONS
from tests.tiny_models import VOCAB, make_tiny

NAMES = [row.base_type for row in ROWS]
MIXTURES = [row.base_type for row in ROWS if row.expert_columns_key]
BATCH, LENGTH = 3, 12


def kept_heads(shape: LayerShape, index: int) -> list[int]:
    """Heads that layer ``index`` keeps: all, all kv groups but one, all but one head of every group, or one group.

    Where blocks of heads lose as many each, one of every block goes.
    """
    if shape.head_blocks > 1:
        size = shape.num_heads // shape.head_blocks
        return [block * size + head for block in range(shape.head_blocks) for head in range(int(index > 0), size)]
    size = shape.heads_per_group
    groups = range(shape.num_kv_heads)
    kept = {0: groups, 1: groups[1:] or groups, 2: groups if size > 1 else groups[2:], 3: groups[-1:]}[index]
    return [group * size + head for group in kept for head in range(int(index == 2 and size > 1), size)]


def kept_columns(shape: LayerShape, index: int) -> list[int]:
    """FFN columns that layer ``index`` keeps: the last ones of every expert, a multiple of 8."""
    width = min(shape.ffn_width, max(8, shape.ffn_width * (5 - index) // 5 // 8 * 8))
    return [
        expert * shape.ffn_width + column
        for expert in range(shape.num_ffns)
        for column in range(shape.ffn_width - width, shape.ffn_width)
    ]


def masks_of(model: PreTrainedModel) -> list[LayerMask]:
    """Masks that leave different heads, kv heads and FFN widths in the four layers of a tiny model."""
    return [
        LayerMask.from_heads(shape, kept_heads(shape, index), kept_columns(shape, index))
        for index, shape in enumerate(layer_shapes(model.config))
    ]


@cache
def checkpoint(name: str, pruned: bool, overrides: str) -> Path:
    """Folder with a tiny model of type ``name``, dense or pruned; ``overrides`` of its configuration are json."""
    model = make_tiny(name, **json.loads(overrides))
    if pruned:
        model = shrink(model, find_family(model.config), masks_of(model))
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_checkpoints().name))
    model.save_pretrained(folder)
    return folder


@cache
def _checkpoints() -> tempfile.TemporaryDirectory:
    """Folder of all of them, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="slimgpt-library-")


@dataclass(frozen=True)
class Subject:
    """A model type, pruned or as the stock class of transformers has it.

    Attributes:
        name: model type of the row.
        pruned: whether the layers have different shapes.
    """

    name: str
    pruned: bool = True

    def folder(self, **overrides: Any) -> Path:
        """Checkpoint of the model, with ``overrides`` of its configuration."""
        return checkpoint(self.name, self.pruned, json.dumps(overrides, sort_keys=True))

    def load(self, overrides: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
        """Model loaded from its checkpoint, in evaluation mode; ``options`` are those of ``from_pretrained``."""
        return AutoModelForCausalLM.from_pretrained(self.folder(**overrides or {}), **options)

    def dense(self) -> "Subject":
        """The stock model of the same type."""
        return Subject(self.name, pruned=False)


Check = Callable[[Subject, Path], None]


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """(``batch``, ``length``) random token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def body_of(subject: Subject, model: PreTrainedModel) -> PreTrainedModel:
    """The model without a head, in the causal language model."""
    return model.get_submodule(FAMILIES[subject.name].layers.partition(".")[0])


def attention_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """Sizes of the layers that have attention heads; in hybrids, others have another mixer of tokens or none."""
    return [shape for shape in layer_shapes(config) if shape.num_heads]


def difference(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the largest value of ``first``."""
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-9))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    """Logits of ``ids``, by default of :func:`tokens`."""
    if ids is None and "inputs_embeds" not in inputs:
        ids = tokens()
    return model(input_ids=ids, **inputs).logits


def every_row(check: Check) -> Callable[..., None]:
    """Make a test of ``check`` for every row of the table, see :func:`_test_of`."""
    return _test_of(check, NAMES)


def every_mixture(check: Check) -> Callable[..., None]:
    """Make a test of ``check`` for every row of a mixture of experts, see :func:`_test_of`."""
    return _test_of(check, MIXTURES)


def _test_of(check: Check, names: list[str]) -> Callable[..., None]:
    """Make a test of ``check`` for the rows ``names``.

    Where ``EXCEPTIONS`` says that the check cannot hold, the stock class has to fail it with the same error.
    """
    excepted = EXCEPTIONS.get(check.__name__, {})
    assert set(excepted) <= set(names), check.__name__

    @pytest.mark.library
    @pytest.mark.parametrize("name", names)
    def test(name: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        if name not in excepted:
            check(Subject(name), tmp_path)
            return
        for pruned in (False, True):
            with pytest.raises(Exception) as failure:
                check(Subject(name, pruned), tmp_path)
            message = f"{type(failure.value).__name__}: {failure.value}"
            assert excepted[name].error in message.replace("Slim", "")

    test.__name__ = test.__qualname__ = check.__name__
    test.__doc__ = check.__doc__
    test.__module__ = check.__module__
    return test
