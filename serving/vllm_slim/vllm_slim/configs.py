"""Configuration classes of the served families; needs ``transformers`` alone."""

import logging
from functools import cache

import transformers
from transformers import AutoConfig, PreTrainedConfig

# Model types of the checkpoints, and the configuration classes of their families, by architecture.
MODEL_TYPES: dict[str, tuple[str, str]] = {
    "SlimLlamaForCausalLM": ("slim_llama", "LlamaConfig"),
    "SlimMistralForCausalLM": ("slim_mistral", "MistralConfig"),
    "SlimQwen2ForCausalLM": ("slim_qwen2", "Qwen2Config"),
    "SlimQwen3ForCausalLM": ("slim_qwen3", "Qwen3Config"),
    "SlimGemmaForCausalLM": ("slim_gemma", "GemmaConfig"),
    "SlimGemma2ForCausalLM": ("slim_gemma2", "Gemma2Config"),
    "SlimGemma3ForCausalLM": ("slim_gemma3", "Gemma3TextConfig"),
    "SlimPhi3ForCausalLM": ("slim_phi3", "Phi3Config"),
    "SlimGraniteForCausalLM": ("slim_granite", "GraniteConfig"),
    "SlimSmolLM3ForCausalLM": ("slim_smollm3", "SmolLM3Config"),
    "SlimOlmo2ForCausalLM": ("slim_olmo2", "Olmo2Config"),
    "SlimOlmo3ForCausalLM": ("slim_olmo3", "Olmo3Config"),
    "SlimMixtralForCausalLM": ("slim_mixtral", "MixtralConfig"),
    "SlimQwen3MoeForCausalLM": ("slim_qwen3_moe", "Qwen3MoeConfig"),
}


class SlimConfigMixin:
    """Mixin of a family's configuration: ``per_layer_config`` has the sizes of each layer.

    Top-level sizes are those of the dense model; vLLM reads them, for instance to estimate memory.
    """

    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = True


@cache
def config_class(architecture: str) -> type[PreTrainedConfig]:
    """Configuration class of ``architecture``."""
    model_type, base = MODEL_TYPES[architecture]
    name = architecture.removesuffix("ForCausalLM") + "Config"
    members = {"model_type": model_type, "__module__": __name__}
    return type(name, (SlimConfigMixin, getattr(transformers, base)), members)


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """A class by its name: worker processes unpickle configurations before vLLM calls the plugin in them."""
    architecture = name.removesuffix("Config") + "ForCausalLM"
    if architecture not in MODEL_TYPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(architecture)


def register_configs() -> None:
    """Register a class for every model type with ``AutoConfig``, so that none is loaded from the checkpoint's code.

    A class that is already registered, for instance by the pruning suite, stays.
    """
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    if not any(isinstance(known, _GlobalReads) for known in logger.filters):
        logger.addFilter(_GlobalReads())
    for architecture, (model_type, _) in MODEL_TYPES.items():
        if model_type not in transformers.CONFIG_MAPPING:
            AutoConfig.register(model_type, config_class(architecture))


class _GlobalReads(logging.Filter):
    """Drops warnings of transformers about top-level sizes, which vLLM reads in many places."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Reading global config value for per-layer attribute")
