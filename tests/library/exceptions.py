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
_WITHOUT_FLEX = (*_WITHOUT_SDPA, "GPTBigCode", "Falcon", "StableLm", "Persimmon")
_ALIBI_ALONE = StockFailure("takes no positions: ALiBi counts the tokens of the mask")


def _type_of(name: str) -> str:
    """Model type of the family ``name``."""
    return next(row.base_type for row in ROWS if row.name == name)


# By check and model type.
EXCEPTIONS: dict[str, dict[str, StockFailure]] = {
    "test_model_without_head_is_that_of_the_causal_model": {
        "llama4_text": StockFailure(
            "loads no weights of a model without a head: its prefix is that of a multimodal one"
        ),
    },
    "test_missing_weights_are_initialised_the_others_loaded": {
        "apertus": StockFailure("does not initialise the parameters of its activation", "AssertionError: model.layers"),
    },
    "test_given_positions_and_mask_are_the_default": {"bloom": _ALIBI_ALONE, "mpt": _ALIBI_ALONE},
    "test_caches_have_the_kv_heads_of_the_layers": {
        "falcon": StockFailure("caches the keys and values of every query head"),
    },
    "test_sdpa_gives_the_logits_of_eager_attention": {
        "gemma2": StockFailure("sdpa has no soft cap of the scores", _NO_SDPA.format("Gemma2")),
        "granite_swa": StockFailure("its sinks are in eager attention alone", _NO_SDPA.format("GraniteSWA")),
        **{_type_of(name): StockFailure("declares no sdpa attention", _NO_SDPA.format(name)) for name in _WITHOUT_SDPA},
    },
    "test_flex_attention_gives_the_logits_of_eager_attention": {
        "granite_swa": StockFailure("its sinks need a GPU", "ValueError: Attention sinks cannot be run on CPU"),
        # Its causal class has a name of its own.
        "gpt2": StockFailure("declares no flex attention", _NO_FLEX.partition("{0}ForCausalLM ")[2]),
        **{_type_of(name): StockFailure("declares no flex attention", _NO_FLEX.format(name)) for name in _WITHOUT_FLEX},
    },
}
