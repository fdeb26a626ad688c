"""Rotary embeddings, attention windows and head sizes of every kind: masked = pruned logits, saved and reloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slim_utils.common.loading import load_model
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink, zero_removed
from tests.tiny_models import TINY, make_tiny

LENGTH = {"original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, **LENGTH},
    "yarn": {"factor": 4.0, **LENGTH},
    "longrope": {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "factor": 4.0, **LENGTH},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTH},
}
CHUNKED = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"] * 2}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """(2, 60) token ids, beyond the original positions of the scalings and every window."""
    return torch.randint(3, TINY["vocab_size"], (2, 60), generator=torch.Generator().manual_seed(0))


def check(model: PreTrainedModel, tokens: torch.Tensor, folder: Path) -> None:
    """Prune ``model``, each layer differently, and compare the saved checkpoints."""
    family, masks = find_family(model.config), []
    for index, shape in enumerate(layer_shapes(model.config)):
        groups = [group for group in range(shape.num_kv_heads) if group != index % shape.num_kv_heads]
        masks.append(LayerMask.from_groups(shape, groups, list(range(index + 1, shape.num_columns))))
    rope = model.config.rope_parameters
    with torch.no_grad():
        dense = model(tokens).logits
        zero_removed(model, family, masks)
        model.save_pretrained(folder / "masked")
        shrink(model, family, masks).save_pretrained(folder / "pruned")
        models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("masked", "pruned")]
        masked, pruned = (model(tokens).logits for model in models)
    assert all(model.config.rope_parameters == rope for model in models)
    assert torch.allclose(masked, pruned, atol=1e-3) and not torch.allclose(masked, dense, atol=1e-2)


@pytest.mark.parametrize("key", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_pruned_model_with_scaled_rope_equals_masked(kind, key, tokens, tmp_path):
    make_tiny("gqa").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    default = config.pop("rope_parameters")
    if key == "rope_parameters":
        config[key] = default | {"rope_type": kind, "rope_theta": 5000.0} | SCALINGS[kind]
    else:
        config |= {"rope_theta": 5000.0, "rope_scaling": {key: kind} | SCALINGS[kind]}
    path.write_text(json.dumps(config))
    model = load_model(str(tmp_path / "dense"), "auto", False)
    assert model.config.rope_parameters["rope_type"] == kind and model.config.rope_parameters["rope_theta"] == 5000.0
    check(model, tokens, tmp_path)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma3_text", {"rope_parameters": GEMMA3}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4} | SCALINGS["longrope"]} | LENGTH),
        ("llama4_text", {**CHUNKED, "moe_layers": [], "no_rope_layers": [1, 0, 1, 0]}),
        # Heads that do not fill the hidden size.
        *((name, {"head_dim": 8}) for name in ("gqa", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")),
    ],
)
def test_pruned_model_with_windows_and_head_sizes_equals_masked(name, overrides, tokens, tmp_path):
    check(make_tiny(name, **overrides), tokens, tmp_path)


@pytest.mark.parametrize("truncate", [True, False, None])
def test_yarn_with_truncate_is_kept_as_it_is_stored(truncate, tokens, tmp_path):
    """Without a value, the library does not truncate; without the key, it does."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, **SCALINGS["yarn"]}
    plain, model = (
        make_tiny("gqa", head_dim=16, rope_parameters=rope) for rope in (yarn, yarn | {"truncate": truncate})
    )
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, model(tokens).logits) == bool(truncate)
    model.save_pretrained(tmp_path / "dense")
    loaded = load_model(str(tmp_path / "dense"), "auto", False)
    assert "truncate" in loaded.config.rope_parameters and loaded.config.rope_parameters["truncate"] is truncate
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    check(loaded, tokens, tmp_path)
