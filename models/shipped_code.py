"""The one file of Python code inside a pruned checkpoint: ``slim_base.py``, followed by the classes of the family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from models.families import HEADS, HEADS_PER_GROUP, KV_HEADS, QKV, Family

BASE = Path(__file__).with_name("slim_base.py")

# Configuration keys of the kinds of rows and counts.
_SIZE_KEYS = {HEADS: "num_attention_heads", KV_HEADS: "num_key_value_heads", HEADS_PER_GROUP: "num_key_value_groups"}

_DOCSTRING = Template('''\
"""$name with per-layer heads and FFN widths, as pruned by SlimGPT.

Needs ``transformers`` (>= 5.15, for ``per_layer_config``) and adds no modeling code: every layer is the library's
class, built from its own entry.
"""
''')

_CLASSES = Template('''\


from transformers import $imported
$experts_comment

class Slim${name}Config(SlimConfigMixin, $config_class):
    """``$config_class`` with heads, kv heads and FFN width per layer."""

    model_type = "$slim_type"


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
    _, _, base = BASE.read_text(encoding="utf-8").partition('"""\n\n')
    classes = _CLASSES.substitute(
        name=family.name,
        imported=", ".join(sorted({family.config_class, family.model_class, family.causal_class})),
        config_class=family.config_class,
        model_class=family.model_class,
        causal_class=family.causal_class,
        slim_type=family.slim_type,
        # With gates on inputs, the stock class has no other implementations.
        experts_comment=_EXPERTS_COMMENT
        if family.expert_columns_key and not family.expert_layout.gate_on_inputs
        else "",
        model_attributes=_model_attributes(family),
        causal_attributes=_assignments({"model_name": _layers_path(family)[0]}, {"model_name": "model"}),
    )
    return f"{_DOCSTRING.substitute(name=family.name)}\n{base.rstrip()}\n{classes}"


def _model_attributes(family: Family) -> str:
    """Attributes of the model class that differ from those of ``SlimModelMixin``, as lines of code."""
    values: dict[str, object] = {"layers_name": _layers_path(family)[1]}
    values["head_norms"] = tuple((name, _SIZE_KEYS[kind]) for name, kind in family.head_norms)
    if family.heads_fill_hidden:
        rows = tuple((name, _size_keys(kinds)) for name, kinds in family.attention_rows)
        values["head_maps"] = (*rows, (family.attention_out, (_SIZE_KEYS["heads"],)))
        values["head_counts"] = tuple((name, _SIZE_KEYS[kind]) for name, kind in family.head_counts)
    return _assignments(values, {"layers_name": "layers"})


def _size_keys(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Configuration keys of the numbers of heads that a map has rows of; query, key and value of a head count once."""
    return tuple(_SIZE_KEYS[part] for kind in kinds for part in ((HEADS,) * 3 if kind == QKV else (kind,)))


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


def _check_names(family: Family) -> None:
    """Check every name of the row that becomes code."""
    modules = [family.layers, family.attention_out]
    modules += [name for name, _ in (*family.attention_rows, *family.head_norms, *family.head_counts)]
    if not re.fullmatch(r"slim_\w+", family.slim_type, flags=re.ASCII):
        raise ValueError(f"model type {family.slim_type!r} is not of the form slim_NAME")
    for identifier in _parts([family.name, family.slim_type, *modules]):
        if not re.fullmatch(r"[A-Za-z_]\w*", identifier, flags=re.ASCII):
            raise ValueError(f"row {family.base_type!r}: {identifier!r} is not an identifier")
    classes = {
        family.config_class: CONFIG_MAPPING_NAMES,
        family.model_class: MODEL_MAPPING_NAMES,
        family.causal_class: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    for class_name, known in classes.items():
        if class_name not in known.values():
            raise ValueError(f"row {family.base_type!r}: {class_name!r} is not such a class of transformers")


def _parts(names: Iterable[str]) -> list[str]:
    return [part for name in names for part in name.split(".")]
