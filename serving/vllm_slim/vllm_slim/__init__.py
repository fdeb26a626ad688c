"""vLLM plugin: checkpoints with per-layer shapes on vLLM's own model classes.

vLLM calls :func:`register`, an entry point of the group ``vllm.general_plugins``, in each of its processes.
"""

from vllm_slim.configs import MODEL_TYPES, register_configs


def register() -> None:
    """Register configurations, architectures and their checks; idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_slim.checks import SlimChecks

    register_configs()
    for architecture in MODEL_TYPES:
        # By name: vLLM imports the module of a model only when it is served.
        ModelRegistry.register_model(architecture, f"vllm_slim.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = SlimChecks
