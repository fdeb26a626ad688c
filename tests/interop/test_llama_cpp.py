"""GGUF files in a real llama.cpp: the same greedy text as in Transformers, one prompt at a time and several at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models  # noqa: F401 - registers the classes of pruned checkpoints

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SLIMGPT_CACHE") or Path.home() / ".cache" / "slimgpt")
PYTHON = ROOT / ".venv-llamacpp" / "bin" / "python"
PROMPTS = ["The history of the city began in", "Once upon a time there was", "Water boils at", "He wrote a book about"]
NEW_TOKENS = 24
NEAR_TIE = 0.02

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not PYTHON.exists(), reason="run scripts/test_serving.sh"),
]

SHAPES = {
    "dense": None,
    "per layer": ["--non_uniform", "--min_sparsity", "0.0625", "--max_sparsity", "0.23"],
    "query heads": ["--non_uniform", "--min_sparsity", "0.1", "--max_sparsity", "0.4", "--gqa_unit", "query_head"],
    "stock": ["--sparsity", "0.2", "--uniform_shapes", "--multiple_of", "64"],
}


def run(*words: object) -> None:
    """One of the suite's scripts."""
    process = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def in_llama_cpp(file: Path, *prompts: str) -> list[str]:
    """Greedy texts of ``prompts``, all at once."""
    script = ROOT / "tests" / "interop" / "llama_cpp_generate.py"
    command = [str(PYTHON), str(script), str(file), str(NEW_TOKENS), *prompts]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])["texts"]


def in_transformers(folder: Path) -> list[str]:
    """Greedy texts of ``PROMPTS`` with the weights rounded to fp16, as in the file.

    Each ends where the two best tokens are nearer than ``NEAR_TIE``: llama.cpp rounds activations to fp16 too.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            best = model(output).logits[0, :-1].topk(2).values
        start = inputs.input_ids.shape[1]
        ties = (best[start - 1 :, 0] - best[start - 1 :, 1] < NEAR_TIE).nonzero().flatten().tolist()
        end = start + ties[0] if ties else output.shape[1]
        texts.append(tokenizer.decode(output[0, start:end], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("shape", SHAPES)
def test_same_greedy_text_as_in_transformers(shape, tmp_path):
    folder = CACHE / "SmolLM2-135M-Instruct"
    if SHAPES[shape]:
        words = [folder, "--data_file", CACHE / "wiki.calibration.txt", "--num_samples", 8, "--seqlen", 256]
        words += [*SHAPES[shape], "--skip_evaluate", "--save_pruned_weights", "--save_dir", tmp_path / "out"]
        run("model_slimming.py", *words)
        folder = tmp_path / "out" / "pruned_weights"
    file = tmp_path / "model.gguf"
    run("scripts/export_gguf.py", folder, file, "--outtype", "f16")
    expected = in_transformers(folder)
    alone = [in_llama_cpp(file, prompt)[0] for prompt in PROMPTS[:2]]
    for got, text in zip(alone + in_llama_cpp(file, *PROMPTS), expected[:2] + expected, strict=True):
        assert got.startswith(text)
    # Ties are rare enough for this to be a comparison.
    assert sum(map(len, expected)) > 60


def test_a_quantised_file_answers(tmp_path):
    words = [CACHE / "SmolLM2-135M-Instruct", "--data_file", CACHE / "wiki.calibration.txt", "--num_samples", 8]
    words += ["--seqlen", 256, "--non_uniform", "--min_sparsity", 0.0625, "--max_sparsity", 0.23, "--multiple_of", 32]
    run("model_slimming.py", *words, "--skip_evaluate", "--save_pruned_weights", "--save_dir", tmp_path / "out")
    sizes = []
    for outtype in ("f16", "q8_0", "q4_0"):
        file = tmp_path / f"{outtype}.gguf"
        run("scripts/export_gguf.py", tmp_path / "out" / "pruned_weights", file, "--outtype", outtype)
        assert in_llama_cpp(file, PROMPTS[0])[0].strip()
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.35 * sizes[0]
