"""Pruned checkpoints that are pruned again, and their ``pruning.json`` in units of the dense model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import model_slimming
from slim_utils.families import Family, find_family, layer_shapes
from slim_utils.masks import LayerMask, read_masks, read_pruning, read_units
from slim_utils.params_remove import kept_indices, select_indices
from tests.integration.finetuning import main as finetune
from tests.tiny_models import TINY_FAMILIES, make_tiny
from train_utils.finetune_result import ModelMasks

# Uneven layers; in each round, a layer stays dense.
FIRST = ["--non_uniform", "--min_sparsity", 0.2, "--max_sparsity", 0.5, "--maxlayer", 3]
SECOND = ["--non_uniform", "--non_uniform_strategy", "linear_decrease", "--min_sparsity", 0.3, "--max_sparsity", 0.5]
SECOND += ["--minlayer", 1]


def prune(model: Path, text_file: Path, out: Path, *flags: object) -> None:
    """Run ``model_slimming.py`` in this process."""
    argv = [model, "--data_file", text_file, "--num_samples", 8, "--seqlen", 16, "--device", "cpu", "--skip_evaluate"]
    argv += ["--save_pruned_weights", "--save_dir", out, *flags]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))


def load(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def check_slices(dense: PreTrainedModel, pruned: PreTrainedModel, family: Family, masks: list[LayerMask]) -> None:
    """Check that ``masks`` slice the weights of ``dense`` to the shapes of ``pruned`` and, where rows are only removed,
    to its values.
    """
    names = [name for name, _ in (*family.attention_rows, *family.mlp_rows)]
    sliced_only = {f"{family.experts}.gate_up_proj"}
    sliced_only |= {f"{name}.{parameter}" for name in names for parameter in ("weight", "bias")}
    layers = zip(family.decoder_layers(dense), family.decoder_layers(pruned), masks, strict=True)
    for layer, pruned_layer, mask in layers:
        weights, expected = pruned_layer.state_dict(), layer.state_dict()
        for name, (dim, indices) in kept_indices(family, mask).items():
            if name in weights:
                kept = select_indices(expected[name], dim, indices)
                assert weights[name].shape == kept.shape, name
                assert name not in sliced_only or torch.equal(weights[name], kept), name
        assert weights.keys() & sliced_only


def check_two_rounds(dense: PreTrainedModel, one: Path, two: Path, name: str) -> None:
    """Check every ``pruning.json`` of two runs of :func:`prune`, the second on the pruned model of the first."""
    family, shapes = find_family(dense.config), layer_shapes(dense.config)
    once, twice = load(one / "pruned_weights"), load(two / "pruned_weights")
    assert (one / "pruning.json").read_text() == (one / "pruned_weights" / "pruning.json").read_text()
    for folder, model in ((one, once), (two, twice)):
        file = folder / "pruned_weights" / "pruning.json"
        content, masks = json.loads(file.read_text()), read_pruning(file)
        assert (content["units_of"], content["dense"]) == (name, True)
        assert content["model_type"] == dense.config.model_type
        assert read_units(file, layer_shapes(model.config)).layers == masks
        # Masks of the dense model, also for sparse training.
        assert read_masks(file.parent, family, shapes) == masks
        check_slices(dense, model, family, masks)
    # Beside the masked model, the same units are kept, and the others of its input removed.
    relative = read_pruning(two / "pruning.json")
    assert [mask.shape for mask in relative] == layer_shapes(once.config)
    check_slices(once, twice, family, relative)
    assert ModelMasks(family, relative).count(load(two))[0] == 0
    assert [bool(mask.plan) for mask in relative] == [False, True, True, True]
    for sizes in ([len(mask.kept_heads) for mask in masks], [mask.kept_width for mask in masks]):
        assert len(set(sizes)) > 1


@pytest.mark.parametrize("variant", TINY_FAMILIES)
def test_pruned_model_of_every_family_pruned_again_has_the_units_of_the_dense_model(
    variant, tokenizer, text_file, tmp_path, monkeypatch
):
    # Some families load every tokenizer as their own class, which has other words.
    monkeypatch.setattr(model_slimming, "load_tokenizer", lambda *args: tokenizer)
    dense, one, two = make_tiny(variant), tmp_path / "one", tmp_path / "two"
    dense.save_pretrained(tmp_path / "dense")
    units = ["kv_group", "query_head"] if variant in ("gemma3_text", "mixtral") else ["query_head", "kv_group"]
    prune(tmp_path / "dense", text_file, one, *FIRST, "--gqa_unit", units[0])
    prune(one / "pruned_weights", text_file, two, *SECOND, "--gqa_unit", units[1])
    check_two_rounds(dense, one, two, "dense")


def test_masked_model_of_a_pruned_model_trained_and_pruned_again_has_the_units_of_the_dense_model(
    checkpoint, text_file, argv, tmp_path, caplog
):
    prune(checkpoint, text_file, tmp_path / "one", *FIRST)
    prune(tmp_path / "one" / "pruned_weights", text_file, tmp_path / "two", *SECOND)
    check_two_rounds(load(checkpoint), tmp_path / "one", tmp_path / "two", checkpoint.name)

    finetune(argv(tmp_path / "two", "--is_mask_training", "true"))
    for name in ("pruning.json", "pruned_weights/pruning.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "two" / name).read_text()
    # The masked model has the shapes of the input of its run.
    prune(tmp_path / "out", text_file, tmp_path / "three", "--sparsity", 0.7)
    file = tmp_path / "three" / "pruned_weights" / "pruning.json"
    last, before = read_pruning(file), read_pruning(tmp_path / "two" / "pruned_weights" / "pruning.json")
    assert read_units(file, layer_shapes(load(file.parent).config)).layers == last
    for mask, earlier in zip(last, before, strict=True):
        assert mask.shape == earlier.shape and set(mask.kept_columns) < set(earlier.kept_columns)
    assert "was pruned before" not in caplog.text


def test_pruning_again_without_a_record_of_the_units_warns_and_names_the_input(checkpoint, text_file, tmp_path, caplog):
    prune(checkpoint, text_file, tmp_path / "one", *FIRST)
    once = (tmp_path / "one" / "pruned_weights").rename(tmp_path / "once")
    (once / "pruning.json").unlink()
    prune(once, text_file, tmp_path / "two", *SECOND)
    twice = (tmp_path / "two" / "pruned_weights").rename(tmp_path / "twice")
    warning = (
        "was pruned before without a record of the units that it kept of tiny-llama: pruning.json will have indices "
        "into the units of once"
    )
    assert f"once {warning}" in caplog.text
    prune(twice, text_file, tmp_path / "three", "--sparsity", 0.3)
    assert f"twice {warning}" in caplog.text
    for folder in (twice, tmp_path / "three", tmp_path / "three" / "pruned_weights"):
        content = json.loads((folder / "pruning.json").read_text())
        assert (content["units_of"], content["model_type"], content["dense"]) == ("once", "slim_llama", False)
        shapes = [mask.shape for mask in read_units(folder / "pruning.json", layer_shapes(load(folder).config)).layers]
        assert shapes == layer_shapes(load(once).config)
