"""Checks that models of a type cannot pass, because the stock class of transformers does not either.

The tests run each of them on the stock class and on the pruned model, and fail once one of them passes.
"""

from dataclasses import dataclass

from models.families import ROWS


@dataclass(frozen=True)
class StockFailure:
    """Why the stock class fails a check.

    Attributes:
        reason: what the class does.
        error: part of the error, with the name of its class in front.
    """

    reason: str
    error: str = "AssertionError"


_NO_SDPA = "ValueError: {0}ForCausalLM does not support an attention implementation through torch.nn"
_NO_FLEX = "ValueError: {0}ForCausalLM does not support an attention implementation through torch's flex_attention"
_WITHOUT_SDPA = ("GPTJ", "CodeGen", "Bloom", "Mpt")
_WITHOUT_FLEX = (
    *(*_WITHOUT_SDPA, "GPTBigCode", "Falcon", "StableLm", "Persimmon"),
    *("Olmoe", "Qwen3_5", "Qwen3Next", "OlmoHybrid", "Jamba", "FalconH1"),
)
_ALIBI_ALONE = StockFailure("takes no positions: ALiBi counts the tokens of the mask")
_NO_POSITIONS = StockFailure("has no embeddings of positions")
_NO_EMBEDDINGS = StockFailure(
    "does not generate from embeddings", "ValueError: You passed `inputs_embeds` to `.generate()`"
)
_INFINITE_LIMIT = StockFailure(
    "does not read its infinite limit of time steps in JSON",
    "StrictDataclassFieldValidationError: Validation error for field 'time_step_limit'",
)
_NO_ROUTER_LOSS = StockFailure("has no loss of its routers", "AttributeError: 'NoneType' object has no attribute")
# States of mixers cannot go back to a shorter text.
_STATEFUL = StockFailure(
    "cannot undo tokens of an assistant", "ValueError: assisted generation is not supported with stateful models"
)


def _type_of(name: str) -> str:
    """Model type of the family ``name``."""
    return next(row.base_type for row in ROWS if row.name == name)


# By check and model type; some checks are of mixtures of experts alone.
EXCEPTIONS: dict[str, dict[str, StockFailure]] = {
    "test_model_without_head_is_that_of_the_causal_model": {
        "llama4_text": StockFailure(
            "loads no weights of a model without a head: its prefix is that of a multimodal one"
        ),
    },
    "test_missing_weights_are_initialised_the_others_loaded": {
        "apertus": StockFailure("does not initialise the parameters of its activation", "AssertionError: model.layers"),
    },
    "test_given_positions_and_mask_are_the_default": {
        **dict.fromkeys(("bloom", "mpt"), _ALIBI_ALONE),
        **dict.fromkeys(("granitemoehybrid", "jamba", "nemotron_h"), _NO_POSITIONS),
    },
    "test_embeddings_as_inputs_give_the_logits_of_their_tokens": dict.fromkeys(
        ("nemotron_h", "falcon_h1"), _NO_EMBEDDINGS
    ),
    "test_half_precision_forward_is_finite": {
        "nemotron_h": StockFailure("computes logits in single precision"),
    },
    "test_tied_weights_stay_tied": {
        "nemotron_h": StockFailure("does not tie its head, whatever the configuration says"),
    },
    "test_config_survives_dicts_json_pickle_and_copies": dict.fromkeys(
        ("granitemoehybrid", "nemotron_h", "falcon_h1"), _INFINITE_LIMIT
    ),
    "test_pruned_model_assists_the_dense_one": dict.fromkeys(
        ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "granitemoehybrid", "jamba", "nemotron_h", "falcon_h1"), _STATEFUL
    ),
    "test_training_step_reaches_every_parameter": {
        "ernie4_5_moe": StockFailure("chooses experts by biases without a gradient"),
        "phimoe": StockFailure(
            "routes a token by one weight where it is far above the others", "AssertionError: model."
        ),
    },
    "test_lora_of_all_linear_modules_is_trained": {
        **dict.fromkeys(
            ("llama4_text", "phimoe"),
            StockFailure("its routers are linear modules that return tuples", "AttributeError: 'tuple' object"),
        ),
        "jamba": StockFailure("computes with the weight of a linear module, not the module"),
    },
    "test_experts_implementations_give_the_same_logits_and_gradients": {
        "llama4_text": StockFailure("has one implementation", "ValueError: Llama4ForCausalLM does not support setting"),
    },
    "test_routers_give_their_logits_and_loss": {
        **dict.fromkeys(
            ("llama4_text", "hunyuan_v1_moe", "glm4_moe", "deepseek_v2", "deepseek_v3", "nemotron_h"), _NO_ROUTER_LOSS
        ),
        "gemma4_text": StockFailure("has no loss of its routers", "AttributeError: 'Gemma4Causal"),
    },
    "test_caches_have_the_kv_heads_of_the_layers": {
        "falcon": StockFailure("caches the keys and values of every query head"),
        "jamba": StockFailure("its mixers start anew with every part of a prompt"),
    },
    "test_sdpa_gives_the_logits_of_eager_attention": {
        "gemma2": StockFailure("sdpa has no soft cap of the scores", _NO_SDPA.format("Gemma2")),
        "granite_swa": StockFailure("its sinks are in eager attention alone", _NO_SDPA.format("GraniteSWA")),
        "gpt_oss": StockFailure("its sinks are in eager attention alone", _NO_SDPA.format("GptOss")),
        **{_type_of(name): StockFailure("declares no sdpa attention", _NO_SDPA.format(name)) for name in _WITHOUT_SDPA},
    },
    "test_flex_attention_gives_the_logits_of_eager_attention": {
        **dict.fromkeys(
            ("granite_swa", "gpt_oss"),
            StockFailure("its sinks need a GPU", "ValueError: Attention sinks cannot be run on CPU"),
        ),
        # Its causal class has a name of its own.
        "gpt2": StockFailure("declares no flex attention", _NO_FLEX.partition("{0}ForCausalLM ")[2]),
        **{_type_of(name): StockFailure("declares no flex attention", _NO_FLEX.format(name)) for name in _WITHOUT_FLEX},
    },
}
