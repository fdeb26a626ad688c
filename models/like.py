"""Rows for model types of transformers that the table has no row for, with the layout of one that it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from models.families import FAMILIES
from models.family import Family

# Key of a checkpoint's configuration: the family whose layout its row repeats.
LIKE_KEY = "slim_family_like"


def row_like(base_type: str, like: str) -> Family:
    """Return a row of model type ``base_type`` with the modules and configuration keys of family ``like``.

    Raises:
        ValueError: if transformers has no causal language model of the type, or the table has no family ``like``.
    """
    classes = [
        names.get(base_type) for names in (CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    ]
    if None in classes:
        raise ValueError(f"transformers has no causal language model of type '{base_type}'")
    if like not in FAMILIES:
        raise ValueError(f"'{like}' is not a supported model type")
    config_class, model_class, causal_class = classes
    return replace(
        FAMILIES[like],
        base_type=base_type,
        slim_type=f"slim_{base_type.replace('-', '_')}",
        name=causal_class.removesuffix("ForCausalLM"),
        config_class=config_class,
        model_class=model_class,
        causal_class=causal_class,
        like=FAMILIES[like].base_type,
    )


def add_row_like(base_type: str, like: str) -> None:
    """Add :func:`row_like` to the table of this process.

    Raises:
        ValueError: see :func:`row_like`.
    """
    row = row_like(base_type, like)
    FAMILIES.update({row.base_type: row, row.slim_type: row})


def add_row_of(config: dict[str, Any]) -> None:
    """Add the row that a checkpoint was pruned with, if it is not in the table.

    Args:
        config: content of its ``config.json``.

    Raises:
        ValueError: see :func:`row_like`.
    """
    model_type, like = config.get("model_type", ""), config.get(LIKE_KEY)
    if not like or model_type in FAMILIES:
        return
    base_types = (name for name in CONFIG_MAPPING_NAMES if model_type in (name, f"slim_{name.replace('-', '_')}"))
    add_row_like(next(base_types, model_type), like)
