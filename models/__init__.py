"""Model classes of pruned checkpoints, registered so that the suite loads them without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from models.modeling_slim_gemma2 import SlimGemma2Config, SlimGemma2ForCausalLM
from models.modeling_slim_gemma3 import SlimGemma3Config, SlimGemma3ForCausalLM
from models.modeling_slim_granite import SlimGraniteConfig, SlimGraniteForCausalLM
from models.modeling_slim_llama import SlimLlamaConfig, SlimLlamaForCausalLM
from models.modeling_slim_mistral import SlimMistralConfig, SlimMistralForCausalLM
from models.modeling_slim_mixtral import SlimMixtralConfig, SlimMixtralForCausalLM
from models.modeling_slim_olmo2 import SlimOlmo2Config, SlimOlmo2ForCausalLM
from models.modeling_slim_opt import SlimOPTConfig, SlimOPTForCausalLM
from models.modeling_slim_phi3 import SlimPhi3Config, SlimPhi3ForCausalLM
from models.modeling_slim_qwen2 import SlimQwen2Config, SlimQwen2ForCausalLM
from models.modeling_slim_qwen3 import SlimQwen3Config, SlimQwen3ForCausalLM
from models.modeling_slim_qwen3_moe import SlimQwen3MoeConfig, SlimQwen3MoeForCausalLM
from models.modeling_slim_smollm3 import SlimSmolLM3Config, SlimSmolLM3ForCausalLM

# By the model type of the family before pruning.
SLIM_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (SlimLlamaConfig, SlimLlamaForCausalLM),
    "smollm3": (SlimSmolLM3Config, SlimSmolLM3ForCausalLM),
    "mistral": (SlimMistralConfig, SlimMistralForCausalLM),
    "qwen2": (SlimQwen2Config, SlimQwen2ForCausalLM),
    "qwen3": (SlimQwen3Config, SlimQwen3ForCausalLM),
    "gemma2": (SlimGemma2Config, SlimGemma2ForCausalLM),
    "gemma3_text": (SlimGemma3Config, SlimGemma3ForCausalLM),
    "olmo2": (SlimOlmo2Config, SlimOlmo2ForCausalLM),
    "granite": (SlimGraniteConfig, SlimGraniteForCausalLM),
    "phi3": (SlimPhi3Config, SlimPhi3ForCausalLM),
    "opt": (SlimOPTConfig, SlimOPTForCausalLM),
    "mixtral": (SlimMixtralConfig, SlimMixtralForCausalLM),
    "qwen3_moe": (SlimQwen3MoeConfig, SlimQwen3MoeForCausalLM),
}

for _config, _model in SLIM_CLASSES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model.model_class)
    AutoModelForCausalLM.register(_config, _model)
