"""--family_like: families without a row of their own."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import model_slimming
from models.families import FAMILIES
from models.family import HEADS, KV_HEADS
from models.like import add_row_of, row_like
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model
from slim_utils.families import layer_shapes
from slim_utils.family_like import add_family_like
from tests.integration.test_families import LOADER
from tests.processes import run_python
from tests.tiny_models import HYBRID, TINY

# A type of transformers with LLaMA's layout and no row.
UNKNOWN = "vaultgemma"


def tiny_config(model_type: str, **fields: object) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**TINY, "num_key_value_heads": 2, **fields})


@pytest.fixture(autouse=True)
def table():
    """Leaves the table as it was."""
    rows = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(rows)


def test_family_like_prunes_saves_and_reloads(tokenizer, text_file, samples, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(UNKNOWN))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run = [tmp_path / "dense", "--data_file", text_file, "--num_samples", 16, "--seqlen", 16, "--device", "cpu"]
    run += ["--sparsity", 0.4, "--gqa_unit", "kv_group", "--skip_evaluate", "--save_pruned_weights"]
    run += ["--save_dir", tmp_path / "out", "--family_like", "llama"]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, run))))
    # As a later process, whose table has no such row.
    del FAMILIES[UNKNOWN], FAMILIES[f"slim_{UNKNOWN}"]
    masked = load_model(str(tmp_path / "out"), "auto", False)
    del FAMILIES[UNKNOWN], FAMILIES[f"slim_{UNKNOWN}"]
    pruned = load_model(str(tmp_path / "out" / "pruned_weights"), "auto", False)
    assert {shape.num_kv_heads for shape in layer_shapes(pruned.config)} == {1}
    with torch.no_grad():
        expected, logits = masked(samples).logits, pruned(samples).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    save_file({"samples": samples, "logits": logits}, tmp_path / "out" / "expected.safetensors")
    process = run_python("-c", LOADER, tmp_path / "out" / "pruned_weights", cwd=tmp_path)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("model_type", "like", "message"),
    [
        ("diffllama", "llama", "requires `num_key_value_heads` to be even"),
        ("bitnet", "llama", "size mismatch for model.layers.0.mlp.ffn_sub_norm.weight"),
        (UNKNOWN, "gpt_neox", "has no attribute"),
        (UNKNOWN, "lama", "model type 'lama' is not supported; nearest supported types: llama"),
        (UNKNOWN, "qwen3_moe", "mixtures of experts need a row of their own"),
        ("qwen3", "llama", "model type 'qwen3' is supported by itself"),
        ("slim_llama", "llama", "is supported by itself"),
        ("gemma3n_text", "gemma3_text", "its layers have several hidden states of a token"),
    ],
)
def test_family_like_that_does_not_fit_is_refused(model_type, like, message):
    with pytest.raises(UserError, match=f"--family_like {like}: .*{re.escape(message)}"):
        add_family_like(tiny_config(model_type), like)


def test_family_like_with_rows_in_another_order_is_refused():
    """Keys, values and queries are as many rows as queries, keys and values."""
    rows = (("self_attn.qkv_proj", (KV_HEADS, KV_HEADS, HEADS)),)
    FAMILIES["reversed"] = replace(FAMILIES.pop("phi3"), attention_rows=rows)
    with pytest.raises(UserError, match="the logits of the pruned and of the masked model differ by"):
        add_family_like(tiny_config("phi3"), "reversed")


@pytest.mark.parametrize("fits", [True, False])
def test_family_like_of_a_hybrid_tries_a_layer_with_heads(fits):
    """Each head has a query and a gate; the first layers are linear attention."""
    row = FAMILIES.pop("qwen3_5_text")
    FAMILIES["mine"] = row if fits else replace(row, attention_rows=FAMILIES["llama"].attention_rows)
    config = tiny_config("qwen3_5_text", **HYBRID | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]})
    if fits:
        add_family_like(config, "mine")
        return
    with pytest.raises(UserError, match=r"does not have this layout: .* size mismatch for model\.layers\.1\.self_attn"):
        add_family_like(config, "mine")


def test_family_like_check_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    add_family_like(tiny_config(UNKNOWN), "llama")
    assert torch.equal(torch.get_rng_state(), state)


def test_row_like_of_a_type_that_transformers_lacks_is_refused():
    with pytest.raises(ValueError, match="no causal language model of type 'mine'"):
        row_like("mine", "llama")
    with pytest.raises(ValueError, match="'import os' is not a supported model type"):
        add_row_of({"model_type": f"slim_{UNKNOWN}", "slim_family_like": "import os"})
    assert f"slim_{UNKNOWN}" not in FAMILIES
