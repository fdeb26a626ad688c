"""Checkpoints of older families as they were saved then: names without the prefix of the model, masks as buffers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model_slimming
from slim_utils.common.loading import load_model
from tests.tiny_models import VOCAB, make_tiny

PREFIX = "transformer."
# Causal masks, and the value that they set.
BUFFERS = {
    "gpt2": {"bias": torch.ones(1, 1, 64, 64)},
    "gptj": {"bias": torch.ones(1, 1, 64, 64, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)},
    "codegen": {"causal_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
    "bloom": {},
}
WITHOUT_PREFIX = ("gpt2", "bloom")


def saved(name: str, folder: Path) -> dict[str, Tensor]:
    """Save a tiny model with the names of an older version of transformers; returns the stored tensors."""
    make_tiny(name).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        for key, buffer in BUFFERS[name].items():
            tensors[f"{PREFIX}h.{layer}.attn.{key}"] = buffer.clone()
    if name in WITHOUT_PREFIX:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("name", BUFFERS)
def test_load_model_of_an_older_checkpoint_gives_its_logits(name, samples, tmp_path):
    saved(name, tmp_path)
    with torch.no_grad():
        expected = make_tiny(name)(samples).logits
        assert torch.equal(load_model(str(tmp_path), "auto", False)(samples).logits, expected)


@pytest.mark.parametrize("flag", [None, "--stream"])
@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_model_slimming_of_an_older_checkpoint_prunes_it(name, flag, samples, tokenizer, text_file, tmp_path):
    saved(name, tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run = [tmp_path / "dense", "--data_file", text_file, "--num_samples", 8, "--seqlen", 16, "--device", "cpu"]
    run += ["--sparsity", 0.4, "--skip_evaluate", "--save_pruned_weights", "--save_dir", tmp_path / "out"]
    run += [flag] if flag else []
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, run))))
    masked, pruned = (load_model(str(tmp_path / "out" / part), "auto", False) for part in ("", "pruned_weights"))
    with torch.no_grad():
        expected, logits = masked(samples).logits, pruned(samples).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert pruned.config.layer_head_num == [4] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_load_model_of_a_stored_head_unties_it_if_it_differs(tied, tmp_path):
    tensors = saved("gpt2", tmp_path)
    tensors["lm_head.weight"] = tensors["wte.weight"] * (1 if tied else 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(str(tmp_path), "auto", False)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert model.config.tie_word_embeddings == tied
    assert model.lm_head.weight.shape == (VOCAB, 24)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
