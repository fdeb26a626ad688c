"""GGUF files in llama.cpp: greedy text and perplexity against Transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppl_eval.ppl_dataset import eval_windows, load_eval_tokens
from ppl_eval.ppl_eval import perplexity
from tests.interop.common import (
    EVALUATION_TEXT,
    GEMMA3,
    NEW_TOKENS,
    PROMPTS,
    ROOT,
    SHAPES,
    engine,
    greedy_tokens,
    run,
    smollm2,
)
from tests.interop.served import record_served

PYTHON = ROOT / ".venv-llamacpp" / "bin" / "python"
# llama.cpp rounds activations to fp16 too.
NEAR_TIE = 0.02

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/test_serving.sh"),
]


def in_llama_cpp(file: Path, *prompts: str) -> list[str]:
    """Greedy texts of ``prompts`` in one batch."""
    return engine(PYTHON, "llama_cpp_generate.py", file, NEW_TOKENS, stdin=json.dumps(prompts))["texts"]


def load_rounded(folder: Path):
    """The model with its weights rounded to fp16."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_generates_the_greedy_text_of_transformers(shape, tmp_path):
    folder, file = smollm2(shape, tmp_path / "out"), tmp_path / "model.gguf"
    run("scripts/export_gguf.py", folder, file, "--outtype", "f16")
    model, tokenizer = load_rounded(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [greedy_tokens(model, tokenizer(prompt).input_ids, NEAR_TIE) for prompt in PROMPTS]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    alone = [in_llama_cpp(file, prompt)[0] for prompt in PROMPTS[:2]]
    for got, text in zip(alone + in_llama_cpp(file, *PROMPTS), expected[:2] + expected, strict=True):
        assert got.startswith(text)
    # Near ties are rare enough for a meaningful comparison.
    assert sum(map(len, expected)) > 60
    record_served("llama.cpp", "llama", shape, "f16")


def test_llama_cpp_generates_the_greedy_text_of_gemma3(tmp_path):
    if not GEMMA3.exists():
        pytest.skip(f"{GEMMA3.name} is not cached")
    file, prompts = tmp_path / "model.gguf", PROMPTS[:2]
    run("scripts/export_gguf.py", GEMMA3, file, "--outtype", "f16")
    model, tokenizer = load_rounded(GEMMA3), AutoTokenizer.from_pretrained(GEMMA3)
    tokens = [greedy_tokens(model, tokenizer(prompt).input_ids, NEAR_TIE) for prompt in prompts]
    for got, ids in zip(in_llama_cpp(file, *prompts), tokens, strict=True):
        assert got.startswith(tokenizer.decode(ids, skip_special_tokens=True))
    assert sum(map(len, tokens)) > 20


@pytest.mark.parametrize("shape", ["dense", "query heads"])
def test_llama_cpp_perplexity_of_f16_equals_that_of_transformers(shape, tmp_path):
    folder, file = smollm2(shape, tmp_path / "out"), tmp_path / "model.gguf"
    run("scripts/export_gguf.py", folder, file, "--outtype", "f16")
    windows = eval_windows(load_eval_tokens(str(EVALUATION_TEXT), AutoTokenizer.from_pretrained(folder)), 128, "text")
    windows = windows[:2]
    expected = perplexity(AutoModelForCausalLM.from_pretrained(folder), windows)
    got = engine(PYTHON, "llama_cpp_perplexity.py", file, stdin=json.dumps(windows.tolist()))
    assert got["targets"] == 2 * 127
    assert got["perplexity"] == pytest.approx(expected, rel=0.01)


def test_llama_cpp_generates_from_quantised_files(tmp_path):
    folder, sizes = smollm2("query heads", tmp_path / "out", "--multiple_of", "32"), []
    # The package with the quantiser of K-quants.
    (packages,) = PYTHON.parents[1].glob("lib/python*/site-packages")
    for outtype in ("f16", "q8_0", "q4_0", "q4_k_m"):
        file = tmp_path / f"{outtype}.gguf"
        run("scripts/export_gguf.py", folder, file, "--outtype", outtype, path=packages)
        assert in_llama_cpp(file, PROMPTS[0])[0].strip()
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.35 * sizes[0]
    # Rows of SmolLM2 are no multiples of 256: most matrices are q5_0.
    assert sizes[2] < sizes[3] < 0.45 * sizes[0]
