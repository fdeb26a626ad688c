"""Every row of the table of families, from the command line to a process without the repository.

The families of ``TINY_FAMILIES`` have tests of every part beside this one; those of ``FURTHER_FAMILIES`` have this one.
"""

import argparse
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import model_slimming
from models.families import FAMILIES, ROWS
from slim_utils.common.errors import UserError
from slim_utils.families import PLUGIN_FAMILIES, SERVED_FAMILIES, SERVED_STOCK, find_family, layer_shapes
from slim_utils.gguf_families import GGUF_FAMILIES
from slim_utils.masks import LayerMask
from slim_utils.params_remove import removed_indices, shrink, zero_indices, zero_removed
from slim_utils.profiling.model_stats import model_stats
from tests.integration.test_families import LOADER
from tests.processes import run_python
from tests.tiny_models import EXPERT_GROUPS, FURTHER_FAMILIES, FURTHER_VARIANTS, TINY_FAMILIES, make_tiny
from train_utils.lora import lora_targets

ROOT = Path(__file__).resolve().parents[2]
# One of each kind: fused gate and up with norms after the blocks; parallel residual with norms per head; fused and
# interleaved queries, keys and values; experts with a shared one. The others are slow.
DEFAULT_TIER = ("glm4", "cohere", "gpt_neox", "glm4_moe")
NAMES = {
    name: name if name in DEFAULT_TIER else pytest.param(name, marks=pytest.mark.slow)
    for name in (*FURTHER_FAMILIES, *FURTHER_VARIANTS)
}
PARAMETERS = pytest.mark.parametrize("name", NAMES.values())
MIXTURES = pytest.mark.parametrize(
    "name",
    [
        parameter
        for name, parameter in NAMES.items()
        if FAMILIES[name.partition(" ")[0]].expert_columns_key
        and not name.endswith(("without experts", "of inputs by layer"))
    ],
)


def flags(*argv: object) -> argparse.Namespace:
    return model_slimming.build_parser().parse_args(list(map(str, argv)))


def difference(first: PreTrainedModel, second: PreTrainedModel, samples: torch.Tensor) -> float:
    """Largest difference of their logits, relative to the largest logit."""
    with torch.no_grad():
        expected = first(samples).logits
        return float((second(samples).logits - expected).abs().max() / expected.abs().max())


@PARAMETERS
def test_family_is_pruned_reloaded_and_trained(name, samples, tokenizer, text_file, tmp_path):
    make_tiny(name).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run = [tmp_path / "dense", "--data_file", text_file, "--num_samples", 16, "--seqlen", 16, "--device", "cpu"]
    run += ["--non_uniform", "--min_sparsity", 0.3, "--max_sparsity", 0.6, "--skip_evaluate"]
    model_slimming.main(flags(*run, "--save_pruned_weights", "--save_dir", tmp_path / "out"))
    dense, masked = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("dense", "out"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned_weights")
    shapes, card = layer_shapes(pruned.config), (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert ("of the shared expert |" in card) == any(shape.num_shared_columns for shape in shapes)
    rows = re.findall(r"^\| +\d+ \| (\S+) .*\|$", card, flags=re.MULTILINE)
    assert [row != "–" for row in rows] == [shape.num_heads > 0 for shape in shapes]
    assert len({(shape.num_heads, shape.num_columns) for shape in shapes}) > 1
    assert difference(masked, pruned, samples) < 1e-4
    assert difference(dense, pruned, samples) > 1e-2
    with torch.no_grad():
        logits = pruned(samples).logits
    # Also compares generation with the cache and without.
    save_file({"samples": samples, "logits": logits}, tmp_path / "out" / "expected.safetensors")
    process = run_python("-c", LOADER, tmp_path / "out" / "pruned_weights", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    config = LoraConfig(r=2, target_modules=lora_targets(pruned, None), init_lora_weights=False)
    adapted = get_peft_model(pruned, config).eval()
    adapted(input_ids=samples, labels=samples).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    assert difference(adapted, adapted.merge_and_unload(), samples) < 1e-4


@PARAMETERS
@pytest.mark.parametrize("by_query_head", [False, True])
def test_removed_rows_feed_removed_columns_alone(name, by_query_head, samples):
    """The pruned model is the dense one with the columns of the output maps zeroed, in float64."""
    model, zeroed = make_tiny(name, torch.float64), make_tiny(name, torch.float64)
    family, masks = find_family(model.config), []
    for index, shape in enumerate(layer_shapes(model.config)):
        columns = [column for column in range(shape.num_columns) if column % 4 != index]
        size = shape.num_heads // max(shape.head_groups, 1)
        if shape.head_blocks > 1 or shape.kv_sharing or (by_query_head and size > 1):
            removed = [group * size + (group + index) % size for group in range(shape.head_groups)]
            heads = [head for head in range(shape.num_heads) if head not in removed]
            masks.append(LayerMask.from_heads(shape, heads, columns))
        else:
            count = shape.num_kv_heads
            groups = [group for group in range(count) if count == 1 or group != index % count]
            masks.append(LayerMask.from_groups(shape, groups, columns))
    maps = [f"{name}.weight" for name in (family.attention_out, family.mlp_out, family.shared_map)]
    outputs = [*maps, f"{family.experts}.down_proj"]
    for layer, mask in zip(family.decoder_layers(zeroed), masks, strict=True):
        for parameter, (dim, indices) in removed_indices(family, mask).items():
            if parameter in outputs and parameter in dict(layer.named_parameters()):
                zero_indices(layer.get_parameter(parameter).data, dim, indices)
    if family.head_norms:
        # These norms include the heads whose rows are zero.
        zero_removed(zeroed, family, masks)
    assert difference(zeroed, shrink(model, family, masks), samples) < 1e-5


@PARAMETERS
def test_uniform_shapes_make_a_stock_model_or_are_refused(name, samples, tmp_path):
    model = make_tiny(name)
    family, masks, shapes = find_family(model.config), [], layer_shapes(model.config)
    kv_heads = {shape.num_kv_heads for shape in shapes if shape.num_heads}
    by_query_head = len(kv_heads) > 1 or any(shape.kv_sharing for shape in shapes)
    for shape in shapes:
        columns, size = list(range(0, shape.num_columns, 2)), shape.heads_per_group
        if by_query_head:
            heads = [head for head in range(shape.num_heads) if head % size >= size // 3]
            masks.append(LayerMask.from_heads(shape, heads, columns))
        else:
            masks.append(LayerMask.from_groups(shape, list(range(1, shape.num_kv_heads)), columns))
    try:
        shrink(model, family, masks, uniform_shapes=True).save_pretrained(tmp_path)
    except UserError as error:
        assert "--uniform_shapes: a stock" in str(error)
        return
    assert not list(tmp_path.glob("*.py"))
    zero_removed(model, family, masks)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.model_type == name.partition(" ")[0]
    # The q/k norms over all heads have another epsilon in a stock model.
    assert difference(model, stock, samples) < 1e-4


@MIXTURES
def test_whole_experts_of_family_are_removed_from_a_stock_model(name, samples, tokenizer, text_file, tmp_path):
    dense = make_tiny(name, **EXPERT_GROUPS.get(name, {}))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run = [tmp_path / "dense", "--data_file", text_file, "--num_samples", 8, "--seqlen", 16, "--device", "cpu"]
    run += ["--expert_unit", "expert", "--sparsity", 0.25, "--skip_evaluate", "--save_pruned_weights"]
    model_slimming.main(flags(*run, "--save_dir", tmp_path / "out"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned_weights")
    assert type(pruned) is type(dense)
    experts = {shape.num_experts for shape in layer_shapes(dense.config)}
    assert {4 * shape.num_experts for shape in layer_shapes(pruned.config)} == {3 * count for count in experts}
    assert difference(dense, pruned, samples) > 1e-2
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (pruned.generate(samples[:2, :5], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def table_lines() -> list[str]:
    """Lines of the table of capabilities in docs/families.md, without their notes."""
    lines = []
    for row in ROWS:
        marks = ["yes"] * 5
        marks.append("yes" if row.base_type in GGUF_FAMILIES else "")
        stock = "stock shapes" if row.base_type in SERVED_STOCK else ""
        with_plugin = "with the plugin" if row.base_type in PLUGIN_FAMILIES else stock
        marks.append("yes" if row.base_type in SERVED_FAMILIES else with_plugin)
        lines.append(" | ".join([f"| `{row.base_type}`", *marks, ""]).rstrip().replace("|  ", "| "))
    return lines


def test_documented_table_is_that_of_the_rows():
    assert {row.base_type for row in ROWS} == {"llama", *TINY_FAMILIES, *FURTHER_FAMILIES}
    assert len({row.slim_type for row in ROWS} | {row.base_type for row in ROWS}) == 2 * len(ROWS) == len(FAMILIES)
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `\w+` \|(?: yes \| yes ).*$", text, flags=re.MULTILINE)
    assert documented == table_lines(), "\n".join(table_lines())


# Families of which some layers have no attention, or no keys and values of their own. The experts of two have 16
# columns, and lose 8 of them or none.
HYBRIDS = (
    "qwen3_5_text",
    "granitemoehybrid",
    "jamba",
    "nemotron_h",
    "nemotron_h without experts",
    "gemma4_text of inputs by layer",
    "gemma4_unified_text",
)
HYBRID_NAMES = [name if name == "qwen3_5_text" else pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS]


@pytest.mark.parametrize("flag", ["--preset=best", "--stream"])
@pytest.mark.parametrize("name", HYBRID_NAMES)
def test_hybrid_loses_heads_where_it_has_them(name, flag, samples, tokenizer, text_file, tmp_path, caplog):
    make_tiny(name).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    run = [tmp_path / "dense", "--data_file", text_file, "--num_samples", 8, "--seqlen", 16, "--device", "cpu"]
    run += ["--allocation", "search", "--refine", 1, "--target_ratio", 0.3] if "best" in flag else ["--sparsity", 0.5]
    with caplog.at_level("INFO"):
        model_slimming.main(
            flags(
                *run,
                flag,
                "--multiple_of",
                8,
                "--skip_evaluate",
                "--save_pruned_weights",
                "--save_dir",
                tmp_path / "out",
            )
        )
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned_weights")
    dense, masked = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("dense", "out"))
    shapes, before = (layer_shapes(model.config) for model in (pruned, dense))
    assert [shape.num_heads > 0 for shape in shapes] == [shape.num_heads > 0 for shape in before]
    # The least loss may cost columns alone.
    sizes = ("num_columns",) if "best" in flag and name != "qwen3_5_text" else ("num_heads", "num_columns")
    for size in sizes:
        assert sum(getattr(shape, size) for shape in shapes) < sum(getattr(shape, size) for shape in before), size
    card = (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert "fewer key/value heads" not in card
    assert difference(masked, pruned, samples) < 1e-4
    assert [layer.shape for layer in model_stats(pruned.config).layers] == shapes
    lines = [message for message in caplog.messages if " ratio " in message]
    reported = [(before[int(re.search(r"layer (\d+)/", line)[1])], line) for line in lines]
    assert all(("heads −" in line) == (shape.num_heads > 0) for shape, line in reported)
    assert all(("columns −" in line) == (shape.num_columns > 0) for shape, line in reported)
