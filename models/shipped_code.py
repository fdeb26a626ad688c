"""The one file of Python code inside a pruned checkpoint: ``slim_base.py``, followed by the classes of the family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from models.family import BLOCKED_QVK, GROUPED_QKV, HEAD_ENTRIES, HEADS, HEADS_PER_GROUP, KV_HEADS, QKV, Family
from models.wrappers import Wrapper

BASE = Path(__file__).with_name("slim_base.py")

# Longest line of code.
LINE_LENGTH = 120
# Configuration keys of the kinds of rows and counts.
_SIZE_KEYS = {
    HEADS: "num_attention_heads",
    HEADS_PER_GROUP: "num_key_value_groups",
    HEAD_ENTRIES: "num_head_entries",
}

_DOCSTRING = Template('''\
"""$name with per-layer heads and FFN widths, as pruned by SlimGPT.

Needs ``transformers`` (>= 5.15, for ``per_layer_config``) and adds no modeling code: every layer is the library's
class, built from its own entry.
"""
''')

_CLASSES = Template('''\


$imports
$experts_comment

class Slim${name}Config(SlimConfigMixin, $config_class):
    """``$config_class`` with heads, kv heads and FFN width per layer."""

    model_type = "$slim_type"
$config_attributes

class Slim${name}Model(SlimModelMixin, $model_class):
    """``$model_class`` with per-layer shapes."""

    config: Slim${name}Config
$model_attributes

class Slim${name}ForCausalLM(SlimForCausalLMMixin, $causal_class):
    """``$causal_class`` around :class:`Slim${name}Model`."""

    config: Slim${name}Config
    model_class = Slim${name}Model
$causal_attributes

Slim${name}Config.register_for_auto_class("AutoConfig")
Slim${name}Model.register_for_auto_class("AutoModel")
Slim${name}ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
''')

_WRAPPER_CLASSES = Template('''\


$imports
$experts_comment

class Slim${text_name}TextConfig(SlimConfigMixin, $text_config_class):
    """``$text_config_class`` with heads, kv heads and FFN width per layer."""

    model_type = "$text_type"


class Slim${text_name}TextModel(SlimModelMixin, $text_model_class):
    """``$text_model_class`` with per-layer shapes."""

    config: Slim${text_name}TextConfig
$model_attributes

# The library's class builds its language model by this table.
AutoModel.register(Slim${text_name}TextConfig, Slim${text_name}TextModel, exist_ok=True)


class Slim${name}Config($config_class):
    """``$config_class`` of a pruned language model."""

    model_type = "$slim_type"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = Slim${text_name}TextConfig(**self.text_config)
        super().__post_init__(**kwargs)


class Slim${name}ForConditionalGeneration($model_class):
    """``$model_class`` around :class:`Slim${text_name}TextModel`."""

    config: Slim${name}Config

    def __init__(self, config: Slim${name}Config) -> None:
        init_dense(super().__init__, config)
        self.set_submodule("$language_model", Slim${text_name}TextModel(config.text_config))
        self.post_init()


Slim${name}Config.register_for_auto_class("AutoConfig")
Slim${name}ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
''')

_EXPERTS_COMMENT = """
# transformers lets a user choose the experts implementation only if this file contains the text
# @use_experts_implementation; without it the choice depends on which of the two classes is used first.
"""


def shipped_code(family: Family) -> str:
    """Return the code that a pruned checkpoint of ``family`` ships.

    Raises:
        ValueError: if a name of the row is not an identifier, or a class is not one of transformers.
    """
    _check_names(family)
    classes = _CLASSES.substitute(
        name=family.name,
        imports=_imports({family.config_class, family.model_class, family.causal_class}),
        config_class=family.config_class,
        model_class=family.model_class,
        causal_class=family.causal_class,
        slim_type=family.slim_type,
        experts_comment=_EXPERTS_COMMENT if _chooses_experts(family.causal_class) else "",
        config_attributes=_config_attributes(family),
        model_attributes=_model_attributes(family),
        causal_attributes=_assignments({"model_name": _layers_path(family)[0]}, {"model_name": "model"}),
    )
    return _module(family.name, classes)


def shipped_wrapper_code(wrapper: Wrapper) -> str:
    """Return the code that a pruned multimodal checkpoint of ``wrapper`` ships.

    Raises:
        ValueError: if a name of a row is not an identifier.
    """
    text = wrapper.family
    _check_identifiers(wrapper.base_type, [wrapper.name, wrapper.slim_type, wrapper.language_model, text.name])
    classes = _WRAPPER_CLASSES.substitute(
        name=wrapper.name,
        text_name=text.name,
        imports=_imports({"AutoModel", wrapper.config_class, wrapper.model_class, text.config_class, text.model_class}),
        text_config_class=text.config_class,
        text_model_class=text.model_class,
        text_type=text.slim_type,
        model_attributes=_model_attributes(text),
        config_class=wrapper.config_class,
        model_class=wrapper.model_class,
        slim_type=wrapper.slim_type,
        language_model=wrapper.language_model,
        experts_comment=_EXPERTS_COMMENT if _chooses_experts(wrapper.model_class) else "",
    )
    return _module(wrapper.name, classes)


def _module(name: str, classes: str) -> str:
    """The shared base, followed by ``classes``."""
    _, _, base = BASE.read_text(encoding="utf-8").partition('"""\n\n')
    return f"{_DOCSTRING.substitute(name=name)}\n{base.rstrip()}\n{classes}"


def _config_attributes(family: Family) -> str:
    """Attributes of the configuration class, as lines of code: the size of a head where the library computes it."""
    config_class: Any = getattr(transformers, family.config_class)
    return "    head_dim: int | None = None\n" if isinstance(getattr(config_class, "head_dim", None), property) else ""


def _imports(names: set[str]) -> str:
    """Line of code that imports ``names`` of transformers, or one per name where it would be too long."""
    line = f"from transformers import {', '.join(sorted(names))}"
    if len(line) <= LINE_LENGTH:
        return line
    return "from transformers import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"


def _model_attributes(family: Family) -> str:
    """Attributes of the model class that differ from those of ``SlimModelMixin``, as lines of code."""
    values: dict[str, object] = {"layers_name": _layers_path(family)[1]}
    values["head_norms"] = tuple((name, _size_key(family, kind)) for name, kind in family.head_norms)
    if family.heads_fill_hidden:
        rows = tuple((name, _size_keys(family, kinds)) for name, kinds in family.attention_rows)
        values["head_maps"] = (*rows, (family.attention_out, (_SIZE_KEYS["heads"],)))
        values["head_counts"] = tuple((name, _size_key(family, kind)) for name, kind in family.head_counts)
    if family.fixed_width:
        values["column_maps"] = (*(name for name, _ in family.mlp_rows), family.mlp_out)
        values["columns_key"] = family.columns_key
    values["head_biases"] = family.head_biases
    return _assignments(values, {"layers_name": "layers"})


def _size_keys(family: Family, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Configuration keys of the numbers of heads that a map has rows of."""
    heads = (HEADS, HEADS, HEADS)
    parts = {QKV: heads, BLOCKED_QVK: heads, GROUPED_QKV: (HEADS, KV_HEADS, KV_HEADS)}
    return tuple(_size_key(family, part) for kind in kinds for part in parts.get(kind, (kind,)))


def _size_key(family: Family, kind: str) -> str:
    """Configuration key of the number of heads of a kind."""
    return family.kv_heads_key if kind == KV_HEADS else _SIZE_KEYS[kind]


def _assignments(values: dict[str, object], defaults: dict[str, str]) -> str:
    """Lines of code that assign ``values``, without empty ones and ``defaults``."""
    return "".join(_assignment(name, value) for name, value in values.items() if value and value != defaults.get(name))


def _assignment(name: str, value: object) -> str:
    if isinstance(value, tuple) and len(value) > 1:
        entries = "".join(f"        {_literal(entry)},\n" for entry in value)
        return f"    {name} = (\n{entries}    )\n"
    return f"    {name} = {_literal(value)}\n"


def _literal(value: object) -> str:
    return repr(value).replace("'", '"')


def _layers_path(family: Family) -> tuple[str, str]:
    """Names of the model in the causal language model, and of the list of decoder layers in the model."""
    model, _, layers = family.layers.partition(".")
    return model, layers


def _chooses_experts(class_name: str) -> bool:
    """Whether the stock class has several implementations of experts, even if the row has no experts."""
    stock_class: Any = getattr(transformers, class_name)
    return stock_class._can_set_experts_implementation()


def _check_names(family: Family) -> None:
    """Check every name of the row that becomes code."""
    modules = [
        family.layers,
        family.attention_out,
        family.mlp_out,
        family.columns_key,
        family.kv_heads_key,
        *family.head_biases,
    ]
    named = (*family.attention_rows, *family.mlp_rows, *family.head_norms, *family.head_counts)
    modules += [name for name, _ in named]
    if not re.fullmatch(r"slim_\w+", family.slim_type, flags=re.ASCII):
        raise ValueError(f"model type {family.slim_type!r} is not of the form slim_NAME")
    _check_identifiers(family.base_type, [family.name, family.slim_type, *modules])
    classes = {
        family.config_class: CONFIG_MAPPING_NAMES,
        family.model_class: MODEL_MAPPING_NAMES,
        family.causal_class: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    for class_name, known in classes.items():
        if class_name not in known.values():
            raise ValueError(f"row {family.base_type!r}: {class_name!r} is not such a class of transformers")


def _check_identifiers(row: str, names: Iterable[str]) -> None:
    for identifier in (part for name in names for part in name.split(".")):
        if not re.fullmatch(r"[A-Za-z_]\w*", identifier, flags=re.ASCII):
            raise ValueError(f"row {row!r}: {identifier!r} is not an identifier")
