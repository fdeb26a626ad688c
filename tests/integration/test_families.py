"""Pruned models of every family, loaded without the repository."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_utils.allocation.planner import plans_of
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model
from slim_utils.families import find_family
from slim_utils.layerwise.pruner import prune_layers
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.params_remove import shrink, zero_removed
from tests.processes import run_python
from tests.tiny_models import TINY_FAMILIES, make_tiny
from tests.wrappers import make_wrapper

# Loads every given folder in a process without access to this repository, and compares logits and generation.
LOADER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder.parent / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.layer_head_num, folder
    with torch.no_grad():
        assert torch.equal(model(expected["samples"]).logits, expected["logits"]), folder
    prompt = expected["samples"][:2, :5]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached, plain = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain), folder
print("loaded", len(sys.argv) - 1)
"""


def test_pruned_models_of_every_family_load_without_the_repository(tmp_path, samples):
    cpu, folders = torch.device("cpu"), []
    for name in TINY_FAMILIES:
        model = make_tiny(name)
        family = find_family(model.config)
        settings = PruningSettings(cpu, cpu)
        masks, _ = prune_layers(model, family, samples, plans_of(model, [0.2, 0.35, 0.5, 0.6], settings), settings)
        zero_removed(model, family, masks)
        pruned = shrink(model, family, masks)
        pruned.save_pretrained(tmp_path / name / "pruned")
        with torch.no_grad():
            expected, logits = model(samples).logits, pruned(samples).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        save_file({"samples": samples, "logits": logits}, tmp_path / name / "expected.safetensors")
        folders.append(str(tmp_path / name / "pruned"))
    process = run_python("-c", LOADER, *folders, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"loaded {len(TINY_FAMILIES)}"


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_load_model_ignores_stored_maps_of_layers_that_reuse_keys_and_values(prefix, samples, tmp_path):
    """As published: maps and norms that the layers do not use are stored all the same."""
    name = "of inputs by layer"
    whole = make_tiny(f"gemma4_text {name}") if prefix == "model." else make_wrapper(f"gemma4 {name}")
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        first = stored[f"{prefix}layers.1.self_attn.{part}.weight"]
        stored[f"{prefix}layers.3.self_attn.{part}.weight"] = torch.randn_like(first)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(str(tmp_path), "auto", False, language_model=True)
    with torch.no_grad():
        expected, logits = whole(samples % 60).logits, model(samples % 60).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_find_family_of_an_unsupported_type_names_the_nearest_ones():
    model = make_tiny("gqa")
    model.config.model_type = "gemma3"
    with pytest.raises(UserError, match="'gemma3' is not supported; nearest supported types: gemma, gemma2, gemma3_te"):
        find_family(model.config)


def test_find_family_of_a_refused_type_says_why():
    config = make_tiny("gqa").config
    config.model_type = "gemma3n_text"
    with pytest.raises(
        UserError, match=r"'gemma3n_text' is not supported: its layers have several hidden states [^;]*$"
    ):
        find_family(config)
