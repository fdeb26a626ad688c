"""``--expert_unit expert`` as a user runs it: stock checkpoints with fewer experts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM

import model_slimming
from ppl_eval.ppl_dataset import eval_windows
from ppl_eval.ppl_eval import perplexity
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_tokenizer
from slim_utils.families import find_family, layer_shapes
from slim_utils.layerwise.resume import LayerStore
from slim_utils.masks import read_masks, read_pruning, read_units
from slim_utils.report.contents import plots
from slim_utils.report.sources import read_sources
from tests.integration.test_pruning_again import check_slices
from tests.processes import run_ranks
from tests.tiny_models import EXPERT_GROUPS, make_tiny

STOCK = {"mixtral": MixtralForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
WHOLE = ["--expert_unit", "expert", "--save_pruned_weights"]


@pytest.fixture
def argv(text_file) -> list:
    """Flags of a run, without model, unit, ratio and output."""
    flags = ["--num_samples", 16, "--seqlen", 32, "--device", "cpu", "--eval_datasets", text_file, "--eval_seqlens", 16]
    return ["--data_file", text_file, *flags]


@pytest.fixture
def mixture(tmp_path, tokenizer):
    """Function that saves a tiny mixture of a family."""

    def save(name: str, **overrides) -> Path:
        make_tiny(name, **overrides).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def main(*arguments: object) -> None:
    """Run the script in this process."""
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, arguments))))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def load(folder: Path):
    """The model of a checkpoint, without remote code."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


@pytest.mark.parametrize(
    ("name", "flags", "experts"),
    [
        ("mixtral", ["--sparsity", 0.25], 3),
        ("mixtral", ["--target_ratio", 0.3], 2),
        ("mixtral", ["--target_ratio", 0.3, "--multiple_of", 3], 3),
        ("qwen3_moe", ["--target_memory", "0.9x", "--at_context", 16], 3),
    ],
)
def test_model_slimming_of_whole_experts_saves_a_stock_checkpoint(
    name, flags, experts, mixture, argv, samples, tmp_path, caplog
):
    caplog.set_level("INFO")
    main(mixture(name), *argv, *WHOLE, *flags, "--save_dir", tmp_path / "out")
    record, folder = record_of(tmp_path / "out"), tmp_path / "out" / "pruned_weights"
    dense, pruned = load(tmp_path / name), load(folder)
    assert type(pruned) is STOCK[name] and "auto_map" not in (folder / "config.json").read_text()
    assert not list(folder.glob("*.py")) and not list((tmp_path / "out").glob("*.safetensors"))
    assert (pruned.config.num_experts, pruned.config.num_experts_per_tok) == (experts, 2)
    # A target is a share of the block weights, and an expert is removed rather than the target missed.
    weights = sum(parameter.numel() for layer in dense.model.layers for parameter in layer.parameters())
    removed = sum(
        layer.mlp.experts.down_proj[experts:].numel() for layer in dense.model.layers if hasattr(layer.mlp, "gate")
    )
    norms = sum(p.numel() for n, p in dense.model.layers.named_parameters() if "norm" in n or "mlp.gate." in n)
    assert record["sizes"]["block_share_removed"] == pytest.approx(3 * removed / (weights - norms))
    assert record["sizes"]["parameters_pruned"] == pruned.num_parameters()
    assert f"every MoE layer keeps {experts} of 4 experts: {300 * removed / (weights - norms):.2f} %" in caplog.text
    assert caplog.text.count(f"experts −{4 - experts}/4 (") == sum(
        shape.num_experts > 0 for shape in layer_shapes(dense.config)
    )
    family, masks = find_family(dense.config), read_pruning(tmp_path / "out" / "pruning.json")
    check_slices(dense, pruned, family, masks)
    for layer, mask in zip(json.loads((folder / "pruning.json").read_text())["layers"], masks, strict=True):
        if mask.shape.num_experts:
            removed_experts = record["layers"][[row["layer"] for row in record["layers"]].index(layer["layer"])][
                "experts"
            ]["removed"]
            assert layer["experts"] == {"kept": mask.kept_experts, "removed": removed_experts}
    assert all(
        row["mlp"]["error_after_compensation"] <= row["mlp"]["error_before_compensation"] for row in record["layers"]
    )
    card = (folder / "README.md").read_text()
    assert "removed whole experts layer by layer" in card and f"(each of {experts} of 4 experts)" in card
    assert "trust_remote_code" not in card and "vllm serve DIR\n" in card
    with pytest.raises(UserError, match="removes whole experts, which zeros cannot mask"):
        read_masks(folder, family, layer_shapes(dense.config))
    panels = plots(read_sources([tmp_path / "out"]))[0].draw().axes
    assert [panel.get_title("left") for panel in panels if panel.get_title("left")] == [
        "query heads",
        "FFN width",
        "experts",
    ]
    with torch.no_grad():
        tokens = pruned.generate(samples[:2, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)


def test_model_slimming_to_fewer_experts_than_a_token_is_routed_to_reduces_top_k(mixture, argv, tmp_path, caplog):
    main(mixture("mixtral"), *argv, *WHOLE, "--sparsity", 0.99, "--save_dir", tmp_path / "out")
    config = load(tmp_path / "out" / "pruned_weights").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (1, 1)
    assert "num_experts_per_tok is reduced from 2 to 1" in caplog.text


def test_model_slimming_evaluates_the_pruned_model(mixture, argv, text_file, tmp_path):
    main(mixture("mixtral"), *argv, *WHOLE, "--sparsity", 0.5, "--save_dir", tmp_path / "out")
    tokens = load_tokenizer(str(tmp_path / "mixtral"), False)(text_file.read_text(), return_tensors="pt").input_ids[0]
    expected = perplexity(load(tmp_path / "out" / "pruned_weights"), eval_windows(tokens, 16, "text"))
    assert record_of(tmp_path / "out")["perplexity"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", *EXPERT_GROUPS])
def test_model_slimming_that_keeps_all_experts_saves_the_same_bits(name, mixture, argv, tmp_path):
    model = mixture(name, **EXPERT_GROUPS.get(name, {}))
    main(model, *argv, *WHOLE, "--sparsity", 0.05, "--skip_evaluate", "--save_dir", tmp_path / "out")
    weights, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out" / "pruned_weights", tmp_path / name)
    )
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_model_slimming_streamed_or_resumed_gives_the_same_bits(name, mixture, argv, tmp_path, monkeypatch):
    flags = [mixture(name, **EXPERT_GROUPS.get(name, {})), *argv, *WHOLE, "--sparsity", 0.5]
    main(*flags, "--save_dir", tmp_path / "whole")
    main(*flags, "--stream", "--save_dir", tmp_path / "streamed")
    save = LayerStore.save

    def interrupted(self, layer, family, report):
        save(self, layer, family, report)
        if report.layer == 2:
            raise KeyboardInterrupt

    for keep in ([], ["--keep_activations", 0]):
        out = tmp_path / f"resumed{len(keep)}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LayerStore, "save", interrupted)
            main(*flags, *keep, "--save_dir", out)
        main(*flags, *keep, "--resume", "--save_dir", out)
    expected = load(tmp_path / "whole" / "pruned_weights").state_dict()
    for name in ("streamed", "resumed0", "resumed2"):
        weights = load(tmp_path / name / "pruned_weights").state_dict()
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)
        assert (tmp_path / name / "pruning.json").read_text() == (tmp_path / "whole" / "pruning.json").read_text()
        records = [record_of(tmp_path / folder) for folder in (name, "whole")]
        assert records[0]["perplexity"][0]["perplexity"] == pytest.approx(
            records[1]["perplexity"][0]["perplexity"], rel=1e-6
        )
        assert [row["experts"] for row in records[0]["layers"]] == [row["experts"] for row in records[1]["layers"]]


@pytest.mark.parametrize("units", [("expert", "expert"), ("columns", "expert"), ("expert", "columns")])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_pruning_again_with_whole_experts_composes_in_units_of_the_dense_model(
    name, units, mixture, argv, samples, tmp_path
):
    path = mixture(name)
    for number, unit in enumerate(units):
        ratio = (
            ["--sparsity", 0.25]
            if unit == "expert"
            else ["--non_uniform", "--min_sparsity", 0.2, "--max_sparsity", 0.5]
        )
        out = tmp_path / str(number)
        main(path, *argv, "--skip_evaluate", "--save_pruned_weights", "--expert_unit", unit, *ratio, "--save_dir", out)
        path = out / "pruned_weights"
    dense, twice = load(tmp_path / name), load(path)
    masks = read_pruning(path / "pruning.json")
    assert read_units(path / "pruning.json", layer_shapes(twice.config)).layers == masks
    assert twice.config.num_experts == (2 if units[0] == units[1] else 3)
    assert twice.config.model_type == (name if "columns" not in units else f"slim_{name}")
    check_slices(dense, twice, find_family(dense.config), masks)
    relative = read_pruning(tmp_path / "1" / "pruning.json")
    assert [mask.shape for mask in relative] == layer_shapes(load(tmp_path / "0" / "pruned_weights").config)
    card = (path / "README.md").read_text()
    assert ("attention heads and FFN columns and whole experts" in card) == ("columns" in units)
    with torch.no_grad():
        assert twice(samples).logits.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--non_uniform", "--max_sparsity", 0.3], "removes as many experts from every layer; leave --non_uniform out"),
        (["--target_ratio", 0.2, "--allocation", "search"], "from every layer; leave --allocation search out"),
        (["--target_ratio", 0.2, "--refine", 1], "from every layer; leave --refine out"),
        (["--sparsity", 0.2, "--minlayer", 1], "from every layer; leave --minlayer out"),
        (["--sparsity", 0.2, "--maxlayer", 3], "from every layer; leave --maxlayer out"),
        (
            ["--target_macs", "0.8x"],
            "leaves the multiply-accumulates of a token nearly as they are; leave --target_macs",
        ),
        (["--target_ratio", 0.2, "--preset", "best"], "prunes no heads and no columns; leave --preset out"),
        (["--sparsity", 0.2, "--exact_heads"], "prunes no heads and no columns; leave --exact_heads out"),
        (["--sparsity", 0.2, "--gqa_unit", "kv_group"], "prunes no heads and no columns; leave --gqa_unit out"),
        (["--sparsity", 0.2, "--save_dir", "OUT"], "saves the pruned model alone, .* add --save_pruned_weights"),
        (["--target_ratio", 0.9], "of what the target removes can be removed"),
    ],
)
def test_flags_that_do_not_go_with_whole_experts_are_refused(flags, message, mixture, argv):
    with pytest.raises(UserError, match=message):
        main(mixture("mixtral"), *argv, "--expert_unit", "expert", *flags)


def test_whole_experts_of_a_dense_model_and_profiles_of_them_are_refused(checkpoint, mixture, argv, tmp_path):
    with pytest.raises(UserError, match="--expert_unit expert: the model has no experts; leave it out"):
        main(checkpoint, *argv, "--expert_unit", "expert", "--sparsity", 0.3)
    out = tmp_path / "out"
    main(mixture("mixtral"), *argv, *WHOLE, "--sparsity", 0.5, "--skip_evaluate", "--save_dir", out)
    with pytest.raises(UserError, match="removes whole experts; use --expert_unit expert with a ratio instead"):
        main(tmp_path / "mixtral", *argv, "--profile", out / "pruning.json")


@pytest.mark.slow
def test_whole_experts_on_two_processes_are_those_of_one(mixture, argv, tmp_path):
    mixture("mixtral")
    for processes in (1, 2):
        flags = [*argv, *WHOLE, "--num_samples", 60, "--sparsity", 0.5, "--skip_evaluate"]
        process = run_ranks(
            processes, "model_slimming.py", tmp_path / "mixtral", *flags, "--save_dir", tmp_path / str(processes)
        )
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "1" / "pruning.json").read_text() == (tmp_path / "2" / "pruning.json").read_text()
    one, two = (load(tmp_path / name / "pruned_weights").state_dict() for name in ("1", "2"))
    for key, tensor in one.items():
        assert (tensor - two[key]).abs().max() <= 1e-3 * tensor.abs().max(), key


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("glm4_moe", ["--sparsity", 0.5], "the router of glm4_moe needs 2 experts in each of its 2 groups, 1 would be"),
        (
            "glm4_moe",
            ["--sparsity", 0.3, "--multiple_of", 3],
            "the router of glm4_moe chooses among 2 groups of as many experts, 3 would be left; change --multiple_of",
        ),
        ("phimoe", ["--sparsity", 0.99], "the router of phimoe needs 2 experts, 1 would be left"),
    ],
)
def test_model_slimming_to_experts_that_the_router_cannot_choose_among_is_refused(
    name, flags, message, mixture, argv, tmp_path
):
    with pytest.raises(UserError, match=f"--expert_unit expert: {message}"):
        main(mixture(name), *argv, *WHOLE, *flags, "--save_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "per_group", "message"),
    [
        (["--sparsity", 0.25], 3, ""),
        (["--sparsity", 0.4], 2, "--sparsity 0.4 leaves 5 experts, rounded to 4"),
        (["--target_ratio", 0.1], 3, ""),
        (["--sparsity", 0.25, "--multiple_of", 4], 2, "--sparsity 0.25 leaves 6 experts, rounded to 4"),
    ],
)
@pytest.mark.parametrize("name", EXPERT_GROUPS)
def test_model_slimming_removes_as_many_experts_from_every_group(
    name, flags, per_group, message, mixture, argv, samples, tmp_path, caplog
):
    caplog.set_level("INFO")
    main(mixture(name, **EXPERT_GROUPS[name]), *argv, *WHOLE, *flags, "--skip_evaluate", "--save_dir", tmp_path / "out")
    dense, pruned = load(tmp_path / name), load(tmp_path / "out" / "pruned_weights")
    assert type(pruned) is type(dense) and pruned.config.n_group == 2
    assert pruned.config.n_routed_experts == 2 * per_group
    family, masks = find_family(dense.config), read_pruning(tmp_path / "out" / "pruning.json")
    for mask, *layers in zip(masks, *map(family.decoder_layers, (dense, pruned)), strict=True):
        if kept := mask.kept_experts:
            assert [expert // 4 for expert in kept] == [0] * per_group + [1] * per_group
            weight, sliced = (layer.get_submodule(family.router).weight for layer in layers)
            assert torch.equal(sliced, weight[kept])
    assert f"every MoE layer keeps {2 * per_group} of 8 experts, as many in each of 2 groups: " in caplog.text
    assert ("rounded to" in caplog.text) == bool(message) and message in caplog.text
    with torch.no_grad():
        assert pruned(samples).logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in EXPERT_GROUPS if name != "deepseek_v2"])
def test_model_slimming_of_experts_that_no_token_reaches_changes_no_logit(name, mixture, argv, samples, tmp_path):
    path, unreached = mixture(name, **EXPERT_GROUPS[name]), [1, 2, 4, 7]
    dense = load(path)
    for key, buffer in dense.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer[unreached] = -10
    dense.save_pretrained(path)
    main(path, *argv, *WHOLE, "--sparsity", 0.5, "--skip_evaluate", "--save_dir", tmp_path / "out")
    for mask in read_pruning(tmp_path / "out" / "pruning.json"):
        assert mask.kept_experts in ([], [0, 3, 5, 6])
    with torch.no_grad():
        expected, logits = dense(samples).logits, load(tmp_path / "out" / "pruned_weights")(samples).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_model_slimming_of_groups_to_fewer_experts_than_are_chosen_reduces_top_k(mixture, argv, tmp_path, caplog):
    model = mixture("deepseek_v3", **EXPERT_GROUPS["deepseek_v3"], num_experts_per_tok=4)
    main(model, *argv, *WHOLE, "--sparsity", 0.25, "--skip_evaluate", "--save_dir", tmp_path / "out")
    assert load(tmp_path / "out" / "pruned_weights").config.num_experts_per_tok == 3
    assert "num_experts_per_tok is reduced from 4 to 3" in caplog.text


def test_pruning_experts_of_groups_again_composes_in_units_of_the_dense_model(mixture, argv, tmp_path):
    path = mixture("deepseek_v3", **EXPERT_GROUPS["deepseek_v3"])
    for name, ratio in (("once", 0.25), ("twice", 0.33)):
        main(path, *argv, *WHOLE, "--sparsity", ratio, "--skip_evaluate", "--save_dir", tmp_path / name)
        path = tmp_path / name / "pruned_weights"
    dense, twice = load(tmp_path / "deepseek_v3"), load(path)
    masks = read_pruning(path / "pruning.json")
    assert {tuple(expert // 4 for expert in mask.kept_experts) for mask in masks} == {(), (0, 0, 1, 1)}
    check_slices(dense, twice, find_family(dense.config), masks)
