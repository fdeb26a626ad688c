"""Log probabilities of tiny random models of every exported family in llama.cpp against those of Transformers."""

import json
import sys
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from gguf.quants import dequantize
from transformers import PreTrainedModel

from tests.gguf_files import export, save_pruned, values
from tests.interop.common import engine
from tests.interop.served import record_served
from tests.interop.test_llama_cpp import PYTHON, pytestmark  # noqa: F401 - marks this file too
from tests.interop.test_llama_cpp_tiny import LINEAR, printable
from tests.tiny_models import TINY_VARIANTS, WINDOWS, make_tiny

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
# Of two heads, which do not fill the hidden size.
FEW_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
FULL: dict[str, Any] = {"layer_types": None, "use_sliding_window": False, "sliding_window": None}
EVERY_FOURTH = {"no_rope_layers": [1, 1, 1, 0]}
BIASES = {"attention_bias": True, "mlp_bias": True}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = TINY_VARIANTS["llama3_rope"]["rope_parameters"]
LOCAL = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}


def longrope(length: int) -> dict[str, Any]:
    """Settings of longrope with ``length`` original positions.

    Transformers has other factors for longer texts, llama.cpp for longer contexts, which are of 256 tokens here.
    """
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": length}
    rope |= {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2 + i / 3 for i in range(8)]}
    return {"rope_parameters": rope, "original_max_position_embeddings": length, "max_position_embeddings": 512}


# Architecture in the file, model type or variant, settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama yarn": ("llama", "gqa", {"rope_parameters": YARN}),
    "llama longrope": ("llama", "gqa", longrope(256)),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen2 few heads": ("llama", "qwen2", {**FEW_HEADS, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", "qwen3", FULL),
    "qwen3 few heads": ("qwen3", "qwen3", {**FULL, **FEW_HEADS, "tie_word_embeddings": True}),
    "gemma": ("gemma", "gemma", {}),
    "gemma2": ("gemma2", "gemma2", CAPS),
    "gemma2 linear": ("gemma2", "gemma2", {"rope_parameters": LINEAR}),
    "gemma2 every third": ("gemma2", "gemma2", {"layer_types": [*WINDOWS[:1] * 2, *WINDOWS[1:3]]}),
    "gemma2 full": ("gemma2", "gemma2", {"layer_types": WINDOWS[1:2] * 4}),
    "gemma2 windows": ("gemma2", "gemma2", {"layer_types": WINDOWS[:1] * 4}),
    "gemma2 deep": ("gemma2", "gemma2", {**FEW_HEADS, "num_hidden_layers": 46, "layer_types": (WINDOWS * 12)[:46]}),
    "gemma3": ("gemma3", "gemma3_text", {"num_key_value_heads": 2, "final_logit_softcapping": 2.0}),
    "gemma3 rope": ("gemma3", "gemma3_text", {"num_key_value_heads": 2, "rope_parameters": LOCAL}),
    "gemma3 full": ("gemma3", "gemma3_text", {"num_key_value_heads": 2, "layer_types": WINDOWS[1:2] * 4}),
    "gemma3 deep": (
        "gemma3",
        "gemma3_text",
        {**FEW_HEADS, "num_hidden_layers": 62, "layer_types": (WINDOWS * 16)[:62]},
    ),
    "phi3": ("phi3", "phi3", {}),
    "phi3 partial": (
        "phi3",
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3 longrope": ("phi3", "phi3", longrope(256)),
    "phi3 longrope far": ("phi3", "phi3", longrope(4)),
    "phi3 few heads": ("llama", "phi3", FEW_HEADS),
    "granite": ("granite", "granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "granite biases": ("granite", "granite", {**BIASES, **FEW_HEADS}),
    "granite llama3": ("granite", "granite", {"rope_parameters": LLAMA3}),
    "olmo2": ("olmo2", "olmo2", {}),
    "olmo2 tied": ("olmo2", "olmo2", {"tie_word_embeddings": True}),
    "olmo3": ("olmo2", "olmo3", {}),
    "olmo3 yarn": ("olmo2", "olmo3", {"rope_parameters": LOCAL | {"full_attention": YARN | {"rope_theta": 300.0}}}),
    "smollm3": ("smollm3", "smollm3", EVERY_FOURTH),
    "seed_oss": ("seed_oss", "seed_oss", {}),
    "ernie4_5": ("ernie4_5", "ernie4_5", {"use_bias": False}),
    "arcee": ("arcee", "arcee", {"mlp_bias": False}),
    "mixtral": ("llama", "mixtral", {}),
    "qwen3_moe": ("qwen3moe", "qwen3_moe", {"mlp_only_layers": [], "moe_intermediate_size": 40}),
}
PER_LAYER = ("qwen2", "phi3")
# Shorter than the windows and longer.
LENGTHS = (5, 23, 40)
TOLERANCE = 0.02


def contexts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def initialise(model: PreTrainedModel) -> None:
    """Weights whose logits are far apart, and norms near those of trained models."""
    torch.manual_seed(1)
    gemma = model.config.model_type.startswith("gemma")
    # Many layers would amplify differences of rounding, as those of llama.cpp's table of GELU.
    std = 0.3 if model.config.num_hidden_layers < 40 else 0.1
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and not gemma), std=0.1)
        else:
            # Gemma's embedding is also the head, and multiplied by the root of the hidden size.
            torch.nn.init.normal_(parameter, std=0.05 if gemma and "embed" in name else std)


@torch.no_grad()
def log_probabilities(model) -> list[torch.Tensor]:
    return [model(torch.tensor([context])).logits[0, -1].log_softmax(-1) for context in contexts()]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[str, list[torch.Tensor], Any]]:
    """Architecture in the file, expected log probabilities and those of llama.cpp of every model, by one engine."""
    base, tokenizer, exports = tmp_path_factory.mktemp("families"), printable(), {}
    for name, (_, model_type, overrides) in MODELS.items():
        model = make_tiny(model_type, **{**SIZES, **overrides})
        initialise(model)
        (base / name).mkdir()
        model.save_pretrained(base / name / "model")
        tokenizer.save_pretrained(base / name / "model")
        exports[name] = model
    for model_type in PER_LAYER:
        name = f"{model_type} per layer"
        exports[name] = save_pruned(base / name / "model", tokenizer, model_type, False, **SIZES).eval()
    (base / "contexts.json").write_text(json.dumps(contexts()))
    architectures = {}
    for name in exports:
        architectures[name] = values(export(base / name / "model", "--outtype", "f32"))["general.architecture"]
    files = {name: base / name / "model.gguf" for name in exports}
    got = engine(PYTHON, "llama_cpp_logprobs.py", base / "contexts.json", *files.values())
    return {
        name: (architectures[name], log_probabilities(model), got[str(files[name])]) for name, model in exports.items()
    }


@pytest.mark.parametrize("name", [*MODELS, *(f"{model_type} per layer" for model_type in PER_LAYER)])
def test_llama_cpp_log_probabilities_equal_those_of_transformers(results, name):
    architecture, expected, got = results[name]
    assert architecture == (MODELS[name][0] if name in MODELS else "deci")
    assert isinstance(got, list), got
    for context, reference in zip(got, expected, strict=True):
        assert (torch.tensor(context) - reference).abs().max() < TOLERANCE
    if name in MODELS:
        record_served("llama.cpp", MODELS[name][1].replace("gqa", "llama"), "stock", "f32")
    else:
        record_served("llama.cpp", name.partition(" ")[0], "query heads", "f32")


@pytest.mark.parametrize("outtype", ["q6_k", "q5_k_m", "q4_k_m"])
def test_llama_cpp_runs_k_quants_as_the_weights_that_gguf_reads_in_them(tmp_path, monkeypatch, outtype):
    (packages,) = PYTHON.parents[1].glob("lib/python*/site-packages")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = make_tiny("phi3", **sizes)
    initialise(model)
    model.save_pretrained(tmp_path / "model")
    printable().save_pretrained(tmp_path / "model")
    reader = export(tmp_path / "model", "--outtype", outtype)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"F32", "Q6_K", *({"q6_k": (), "q5_k_m": ("Q5_K",), "q4_k_m": ("Q4_K", "Q5_K")}[outtype])}
    names = get_tensor_name_map(MODEL_ARCH.PHI3, 4)
    sources = {names.get_name(name, try_suffixes=(".weight",)): value for name, value in model.state_dict().items()}
    for tensor in reader.tensors:
        packed = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        error = (packed - sources[tensor.name]).abs().max() / sources[tensor.name].abs().max()
        assert error < {"F32": 1e-6, "Q6_K": 0.03, "Q5_K": 0.06, "Q4_K": 0.1}[tensor.tensor_type.name]
        sources[tensor.name].copy_(packed)
    (tmp_path / "contexts.json").write_text(json.dumps(contexts()))
    (results,) = engine(PYTHON, "llama_cpp_logprobs.py", tmp_path / "contexts.json", tmp_path / "model.gguf").values()
    # llama.cpp also rounds the activations, to 8 bits, which random layers amplify.
    for got, expected in zip(results, log_probabilities(model), strict=True):
        assert (torch.tensor(got) - expected).abs().mean() < 0.3 * expected.std()
