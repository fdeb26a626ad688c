"""Multimodal models around a language model of the table: where it is in a checkpoint, and what it is by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from models.families import FAMILIES
from models.family import HEADS, HEADS_PER_GROUP, KV_HEADS, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Key of a language model's configuration: the type of the multimodal model that it was part of.
TEXT_OF_KEY = "slim_text_of"
# Stored names of the language model, with those of its causal language model: as published, and as newer versions save.
LANGUAGE_MODEL_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
# Stored names of the parts of a multimodal model beside its language model.
OTHER_PARTS = (
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|"
    r"audio_tower|embed_vision|embed_audio)\."
)
# Keys of a text configuration that do not apply to the language model by itself.
_WRAPPED_KEYS = ("model_type", "architectures", "auto_map", "transformers_version")
# Sections of the rotary angles for time, height and width; for text, the three positions of a token are the same.
_MROPE_KEYS = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model type with a language model of one type.

    Attributes:
        base_type: model type of transformers, before pruning.
        name: name in its class names.
        family: row of its language model: one of the table, or with other classes.
        alone: model type of the family that computes the same for text, before pruning.
        alone_keys: configuration keys that this type needs for it, and their values.
        experts_transposed: whether experts are stored transposed, unlike those of this type.
        language_model: name of the language model, without its head, in the multimodal model.
        head: name of its head.
    """

    base_type: str
    name: str
    family: Family
    alone: str
    alone_keys: tuple[tuple[str, Any], ...] = ()
    experts_transposed: bool = False
    language_model: str = "model.language_model"
    head: str = "lm_head"

    @property
    def slim_type(self) -> str:
        """Model type of the pruned model."""
        return f"slim_{self.base_type}_{self.family.base_type}"

    @property
    def config_class(self) -> str:
        """Configuration class of transformers."""
        return f"{self.name}Config"

    @property
    def model_class(self) -> str:
        """Model class of transformers."""
        return f"{self.name}ForConditionalGeneration"

    def wrapped_name(self, name: str) -> str:
        """Return the name in the multimodal model of a parameter of the language model by itself."""
        module, _, rest = name.partition(".")
        return f"{self.head if module == 'lm_head' else self.language_model}.{rest}"


def _of_table(base_type: str, name: str, *families: str, **names: Any) -> list[Wrapper]:
    return [Wrapper(base_type, name, FAMILIES[family], family, **names) for family in families]


def _qwen(base_type: str, name: str, alone: str, **differences: Any) -> Wrapper:
    """Row of a model whose language model has classes of its own; ``differences`` are those of its family."""
    classes: dict[str, Any] = {"config_class": f"{name}TextConfig", "model_class": f"{name}TextModel"}
    text_type = f"{base_type}_text"
    family = replace(
        FAMILIES[alone], base_type=text_type, slim_type=f"slim_{text_type}", name=name, **classes, **differences
    )
    return Wrapper(base_type, name, family, alone)


_FILLS_HIDDEN = {
    "heads_fill_hidden": True,
    "head_counts": (
        ("self_attn.num_heads", HEADS),
        ("self_attn.num_key_value_heads", KV_HEADS),
        ("self_attn.num_key_value_groups", HEADS_PER_GROUP),
    ),
}

WRAPPER_ROWS = (
    *_of_table("gemma3", "Gemma3", "gemma3_text"),
    *_of_table("gemma4", "Gemma4", "gemma4_text"),
    *_of_table("mistral3", "Mistral3", "mistral", "ministral3"),
    _qwen("qwen2_vl", "Qwen2VL", "qwen2", **_FILLS_HIDDEN),
    _qwen("qwen2_5_vl", "Qwen2_5_VL", "qwen2", **_FILLS_HIDDEN),
    _qwen("qwen3_vl", "Qwen3VL", "qwen3"),
    # Always normalises the weights of its router.
    replace(
        _qwen("qwen3_vl_moe", "Qwen3VLMoe", "qwen3_moe"),
        alone_keys=(("norm_topk_prob", True),),
        experts_transposed=True,
    ),
    *_of_table("qwen3_5", "Qwen3_5", "qwen3_5_text"),
    *_of_table("llama4", "Llama4", "llama4_text", language_model="language_model.model", head="language_model.lm_head"),
    *_of_table("paligemma", "PaliGemma", "gemma", "gemma2"),
)
# Every multimodal model type, before and after pruning.
WRAPPER_TYPES = {name for wrapper in WRAPPER_ROWS for name in (wrapper.base_type, wrapper.slim_type)}


def find_wrapper(config: PreTrainedConfig) -> Wrapper:
    """Return the row of a multimodal model of a type in ``WRAPPER_TYPES``.

    Raises:
        ValueError: if its language model is of a type that is not supported.
    """
    text_type = config.text_config.model_type
    for wrapper in WRAPPER_ROWS:
        types = {wrapper.base_type: wrapper.family.base_type, wrapper.slim_type: wrapper.family.slim_type}
        if types.get(config.model_type) == text_type:
            return wrapper
    raise ValueError(f"its language model is a '{text_type}', which is not supported in a '{config.model_type}'")


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether ``config`` has the configuration of a language model as a part."""
    return getattr(config, "text_config", None) is not None


def language_model_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the language model of a multimodal model, as a causal language model by itself.

    Raises:
        ValueError: see :func:`find_wrapper`.
    """
    wrapper, text = find_wrapper(config), config.text_config
    fields: dict[str, Any] = {key: value for key, value in text.to_dict().items() if key not in _WRAPPED_KEYS}
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = {k: v for k, v in fields["rope_parameters"].items() if k not in _MROPE_KEYS}
    if fields.get("use_bidirectional_attention") is True:
        # PaliGemma's prefix; text after it, and a text without an image, is causal.
        fields["use_bidirectional_attention"] = False
    fields |= dict(wrapper.alone_keys)
    if wrapper.head == "lm_head":
        # It is outside the language model.
        fields["tie_word_embeddings"] = getattr(config, "tie_word_embeddings", False)
    row = FAMILIES[wrapper.alone]
    slim = text.model_type == wrapper.family.slim_type
    alone = AutoConfig.for_model(row.slim_type if slim else row.base_type, **fields)
    alone.dtype = alone.dtype or config.dtype
    alone.name_or_path = config.name_or_path
    setattr(alone, TEXT_OF_KEY, wrapper.base_type)
    return alone


@contextmanager
def experts_as_stored(config: PreTrainedConfig) -> Iterator[None]:
    """Context in which a language model by itself is loaded from a multimodal checkpoint whose experts are transposed.

    Args:
        config: configuration by :func:`language_model_config`.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    transposed = {wrapper.base_type for wrapper in WRAPPER_ROWS if wrapper.experts_transposed}
    if getattr(config, TEXT_OF_KEY) not in transposed:
        yield
        return
    row = FAMILIES[config.model_type]
    mapping = get_checkpoint_conversion_mapping(getattr(config, TEXT_OF_KEY))
    register_checkpoint_conversion_mapping(row.causal_class, mapping, overwrite=True)
    try:
        yield
    finally:
        mapping = get_checkpoint_conversion_mapping(row.base_type)
        register_checkpoint_conversion_mapping(row.causal_class, mapping, overwrite=True)
