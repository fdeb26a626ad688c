"""Mixtures that lost whole experts in vLLM and llama.cpp: stock checkpoints with fewer experts."""

import json

import pytest
import torch

from slim_utils.families import SERVED_MIXTURES
from tests.gguf_files import export, values
from tests.interop import test_llama_cpp, test_vllm
from tests.interop.common import engine
from tests.interop.served import record_served
from tests.interop.test_llama_cpp_families import MODELS, SIZES, TOLERANCE, contexts, initialise, log_probabilities
from tests.interop.test_llama_cpp_tiny import printable
from tests.interop.tiny_served import pruned_model, without_experts
from tests.tiny_models import make_tiny

SHAPE = "whole experts"


def marked(tests):
    """The marks of the tests of an engine, as a decorator."""

    def mark(function):
        for entry in tests.pytestmark:
            function = entry(function)
        return function

    return mark


@marked(test_vllm)
@pytest.mark.parametrize("model_type", SERVED_MIXTURES)
def test_vllm_generates_the_greedy_tokens_of_transformers(model_type, tmp_path):
    model = pruned_model(model_type, SHAPE)
    assert model.config.num_experts == 3
    model.save_pretrained(tmp_path)
    test_vllm.compare(tmp_path, test_vllm.TOKEN_PROMPTS, type(model).__name__)
    record_served("vLLM", model_type, SHAPE, "fp32")


@marked(test_llama_cpp)
@pytest.mark.parametrize("model_type", SERVED_MIXTURES)
def test_llama_cpp_log_probabilities_equal_those_of_transformers(model_type, tmp_path):
    dense = make_tiny(model_type, **SIZES, **MODELS[model_type][2])
    initialise(dense)
    model = without_experts(dense)
    model.save_pretrained(tmp_path / "model")
    printable().save_pretrained(tmp_path / "model")
    header = values(export(tmp_path / "model", "--outtype", "f32"))
    assert header[f"{header['general.architecture']}.expert_count"] == 3
    (tmp_path / "contexts.json").write_text(json.dumps(contexts()))
    files = tmp_path / "contexts.json", tmp_path / "model.gguf"
    (results,) = engine(test_llama_cpp.PYTHON, "llama_cpp_logprobs.py", *files).values()
    for got, expected in zip(results, log_probabilities(model), strict=True):
        assert (torch.tensor(got) - expected).abs().max() < TOLERANCE
    record_served("llama.cpp", model_type, SHAPE, "f32")
