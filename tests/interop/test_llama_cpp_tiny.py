"""Tiny GGUF files in llama.cpp: token ids of every kind of tokenizer, and perplexity, against Transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ppl_eval.ppl_eval import perplexity
from tests.conftest import random_text
from tests.gguf_files import (
    AWKWARD,
    BYTE_LEVEL,
    SENTENCEPIECE,
    TEXTS,
    byte_level,
    export,
    save_pruned,
    sentencepiece_llama,
)
from tests.interop.common import GEMMA3, SMOLLM2, engine
from tests.interop.test_llama_cpp import PYTHON, pytestmark  # noqa: F401 - marks this file too
from tests.tiny_models import TINY_VARIANTS, make_tiny

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


# Spaces that llama.cpp puts before a text that starts with one, and after every special token, unlike Metaspace.
OTHER_SPACES = ("metaspace",)


def token_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids of ``texts`` in llama.cpp, with the tokenizer of ``folder``."""
    export(folder)
    return engine(PYTHON, "llama_cpp_tokenize.py", folder.with_name("model.gguf"), stdin=json.dumps(texts))["ids"]


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_llama_cpp_token_ids_equal_those_of_transformers(tmp_path, kind):
    sentencepiece = kind in SENTENCEPIECE
    tokenizer = sentencepiece_llama(tmp_path / "base", kind) if sentencepiece else byte_level(kind)
    make_tiny("gqa", vocab_size=610, bos_token_id=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = TEXTS if kind in OTHER_SPACES else TEXTS + AWKWARD
    assert token_ids(tmp_path / "model", texts) == [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("source", [SMOLLM2, GEMMA3], ids=["SmolLM2", "Gemma 3"])
def test_llama_cpp_token_ids_of_published_tokenizers_equal_those_of_transformers(tmp_path, source):
    if not source.exists():
        pytest.skip(f"{source.name} is not cached")
    tokenizer = AutoTokenizer.from_pretrained(source)
    make_tiny("gqa", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = TEXTS + AWKWARD
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "2 + 2 = 4"}]
        texts = [*texts, tokenizer.apply_chat_template(turns, tokenize=False)]
    assert token_ids(tmp_path / "model", texts) == [tokenizer(text).input_ids for text in texts]


MODELS = {
    **{name: (name, {}) for name in TINY_VARIANTS},
    "linear": ("gqa", {"rope_parameters": LINEAR}),
    "window": ("mistral", {"sliding_window": 24}),
    "untied head": ("tied", {}),
}


def printable() -> PreTrainedTokenizerFast:
    """A BPE of letters and digits only: llama.cpp's server withholds incomplete UTF-8."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator([random_text(500)], trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_perplexity_of_tiny_models_equals_that_of_transformers(tmp_path, name, uniform):
    variant, overrides = MODELS[name]
    save_pruned(tmp_path / "model", printable(), variant, uniform, vocab_size=400, **overrides)
    if name == "untied head":
        state = load_file(tmp_path / "model/model.safetensors")
        state["lm_head.weight"] = torch.randn(state["model.embed_tokens.weight"].shape)
        save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    export(tmp_path / "model", "--outtype", "f32")
    windows = torch.randint(2, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), windows)
    got = engine(PYTHON, "llama_cpp_perplexity.py", tmp_path / "model.gguf", stdin=json.dumps(windows.tolist()))
    assert got["perplexity"] == pytest.approx(expected, rel=0.01)
