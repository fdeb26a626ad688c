"""Checkpoints that do not match their configuration, or are not models: one-line errors with names."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import model_slimming
import test_flops
from model_finetune import main as finetune
from scripts import compare_models, export_gguf
from slim_utils.common.checkpoint_checks import _recorded_unexpected, check_weights
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_config, load_model, load_tokenizer, save_checkpoint
from slim_utils.layerwise.offload import OffloadedModel
from slim_utils.profiling.model_stats import model_stats
from tests.tiny_models import make_tiny
from train_utils.finetune_args import parse_args

WEIGHTS = "model.safetensors"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1000\n"
State = dict[str, Tensor]


def stored(folder: Path, checkpoint: Path, change: Callable[[State], State]) -> Path:
    """A copy of ``checkpoint`` in ``folder`` with changed weights."""
    shutil.copytree(checkpoint, folder)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def configured(folder: Path, checkpoint: Path, **fields: Any) -> Path:
    """A copy of ``checkpoint`` in ``folder`` with changed fields of the configuration; ``...`` removes a field."""
    shutil.copytree(checkpoint, folder)
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return folder


def renamed(prefix: str) -> Callable[[State], State]:
    """A change that puts a prefix before every name."""
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(name: str) -> Callable[[State], State]:
    """A change that drops a tensor."""
    return lambda state: {key: value for key, value in state.items() if key != name}


def added(name: str, tensor: Tensor) -> Callable[[State], State]:
    """A change that adds or replaces a tensor."""
    return lambda state: state | {name: tensor}


def load(mode: str, model: Path, scratch: Path) -> None:
    """Load the whole model or, streamed, open it on disk."""
    if mode == "whole":
        load_model(str(model), "auto", False)
    else:
        OffloadedModel(str(model), "auto", False, scratch).close()


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("mode", ["whole", "streamed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(DOWN), f"missing: {DOWN}$"),
        (added(DOWN, torch.ones(24, 39)), rf"wrong shape: {DOWN} \(\[24, 39\], not \[24, 40\]\)$"),
        (added("model.layers.4.mlp.down_proj.weight", torch.ones(24, 40)), r"not part of the model: model\.layers\.4"),
        (added("module.lm_head.weight", torch.ones(64, 24)), r"not part of the model: module\.lm_head\.weight"),
        (renamed("student."), r"missing: lm_head\.weight, .* and 35 more; not part of the model: student\.lm_head"),
        (lambda state: renamed("module.")(without(DOWN)(state)), r"missing: lm_head\.weight"),
    ],
)
def test_load_model_with_other_weights_than_configured_names_them(mode, change, message, checkpoint, tmp_path, caplog):
    model = stored(tmp_path / "model", checkpoint, change)
    with pytest.raises(UserError, match=message) as error:
        load(mode, model, tmp_path / "scratch")
    assert "\n" not in str(error.value)
    # The line replaces the library's load report.
    assert "LOAD REPORT" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_load_model_with_an_expert_short_names_the_layer(tmp_path):
    make_tiny("mixtral").save_pretrained(tmp_path / "whole")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    model = stored(tmp_path / "model", tmp_path / "whole", without(name))
    with pytest.raises(UserError, match=r"incomplete: model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(str(model), "auto", False)


@pytest.mark.parametrize("variant", ["gqa", "tied", "mixtral"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_load_model_of_wrapped_weights_strips_the_prefix(prefix, variant, tmp_path, tokenizer, caplog):
    dense = make_tiny(variant)
    dense.save_pretrained(tmp_path / "dense")
    model = stored(tmp_path / "model", tmp_path / "dense", renamed(prefix))
    with caplog.at_level(logging.INFO):
        loaded = load_model(str(model), "auto", False)
    assert "names of a wrapped model" in caplog.text
    for name, tensor in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Saved under the names of the library.
    save_checkpoint(loaded, tokenizer, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(tmp_path / "dense" / WEIGHTS).keys()
    host = OffloadedModel(str(model), "auto", False, tmp_path / "scratch")
    layer = host.onload(1, torch.device("cpu"))
    for name, tensor in dense.model.layers[1].state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    host.close()


def test_load_model_of_partly_compiled_weights_strips_the_inner_prefix(checkpoint, tmp_path):
    model = stored(
        tmp_path / "model",
        checkpoint,
        lambda state: {name.replace("layers.2.", "layers.2._orig_mod."): tensor for name, tensor in state.items()},
    )
    assert torch.equal(load_model(str(model), "auto", False).state_dict()[DOWN], load_file(model / WEIGHTS)[DOWN])


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_load_model_with_harmless_extras_logs_that_they_are_ignored(mode, checkpoint, tmp_path, caplog):
    extras = {"mtp.layers.0.weight": torch.ones(2), "v_head.summary.weight": torch.ones(2)}
    extras["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    model = stored(tmp_path / "model", checkpoint, lambda state: state | extras)
    with caplog.at_level(logging.INFO):
        load(mode, model, tmp_path / "scratch")
    assert "ignoring weights outside the language model: mtp.layers.0.weight, v_head.summary.weight" in caplog.text


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen3_next", "mtp.layers.0.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
        ("glm4_moe", "model.layers.46.shared_head.norm.weight"),
    ],
)
def test_check_weights_names_heads_that_the_class_leaves_out_in_silence(name, extra, tmp_path, caplog):
    make_tiny(name).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS) | {extra: torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with caplog.at_level(logging.INFO):
        check_weights(str(tmp_path), load_config(str(tmp_path), False))
    assert caplog.messages == [f"model {tmp_path}: ignoring weights outside the language model: {extra}"]


def test_recorded_unexpected_in_another_version_of_the_library_changes_nothing(monkeypatch):
    method = "_adjust_missing_and_unexpected_keys"
    monkeypatch.setattr(PreTrainedModel, method, lambda model, missing, *, unexpected_keys: (missing, unexpected_keys))
    with _recorded_unexpected() as unexpected:
        model = SimpleNamespace()
        assert getattr(PreTrainedModel, method)(model, ["a"], unexpected_keys=["b"]) == (["a"], ["b"])
    assert unexpected == set()
    monkeypatch.delattr(PreTrainedModel, method)
    with _recorded_unexpected() as unexpected:
        assert unexpected == set()
    assert not hasattr(PreTrainedModel, method)


@pytest.mark.parametrize("variant", ["gqa", "tied", "opt", "qwen3_moe"])
def test_check_weights_of_a_complete_checkpoint_is_empty(variant, tmp_path, caplog):
    make_tiny(variant).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert check_weights(str(tmp_path), load_config(str(tmp_path), False)) == {}
    assert "model" not in caplog.text


def wrong_checkpoints(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """Wrong checkpoints, for which the library raises various errors, by the expected message."""

    def pointer(name: str, file: str) -> Path:
        shutil.copytree(checkpoint, folder / name)
        (folder / name / WEIGHTS).unlink()
        (folder / name / file).write_text(LFS_POINTER)
        return folder / name

    adapters = folder / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    fused = folder / "SFT"
    shutil.copytree(adapters, fused)
    (fused / "lora_fused_model").mkdir()
    configs = {
        "expected int, got float": {"max_position_embeddings": 64.0},
        "The hidden size .* is not a multiple": {"num_attention_heads": 5},
        "wrong shape: lm_head.weight": {"vocab_size": 70},
        "wrong shape: model.layers.0.self_attn.k_proj": {"num_key_value_heads": ...},
        "KeyError: 'newer'": {"rope_parameters": {"rope_type": "newer", "rope_theta": 1e4, "factor": 2.0}},
        r"KeyError: 'novel' \(unknown to transformers \d": {"hidden_act": "novel"},
        "cannot be loaded: Missing required keys in `rope_parameters` .*'factor'}$": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}
        },
        r"quantised \(gptq\); use the unquantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    }
    checkpoints = {
        message: configured(folder / f"m{index}", checkpoint, **fields)
        for index, (message, fields) in enumerate(configs.items())
    }
    return checkpoints | {
        f"{WEIGHTS}: a Git LFS pointer.* git lfs pull": pointer("lfs", WEIGHTS),
        "pytorch_model.bin: a Git LFS pointer.* git lfs pull": pointer("bin", "pytorch_model.bin"),
        "an adapter of type None; only LoRA": adapters,
        f"a folder of adapters; use {fused}/lora_fused_model": fused,
    }


def script(name: str, model: Path, folder: Path, text_file: Path, instruction_file: Path) -> None:
    """Run a script of the suite on ``model`` in this process."""
    if name == "model_slimming":
        argv = [model, "--data_file", text_file, "--num_samples", 4, "--seqlen", 16, "--device", "cpu"]
        model_slimming.main(model_slimming.build_parser().parse_args([*map(str, argv), "--skip_evaluate"]))
    elif name == "model_finetune":
        argv = ["--model_name_or_path", model, "--data_path", instruction_file, "--output_dir", folder / "out"]
        argv += ["--val_dataset_size", 8, "--max_length", 32, "--extra_val_set", "none"]
        argv += ["--prompt_template_name", "none", "--cache_dataset", "false"]
        finetune(parse_args(list(map(str, argv))))
    elif name == "compare_models":
        argv = [model, model, "--eval_datasets", text_file, "--eval_seqlens", 16, "--device", "cpu"]
        compare_models.measure(compare_models.build_parser().parse_args(list(map(str, argv))))
    elif name == "export_gguf":
        export_gguf.main(export_gguf.build_parser().parse_args([str(model), str(folder / "x.gguf")]))
    else:
        argv = ["--base_model", model, "--compare", model, "--device", "cpu", "--lengths", 4, "--repeats", 1]
        test_flops.main(test_flops.build_parser().parse_args(list(map(str, argv))))


@pytest.mark.parametrize("name", ["model_slimming", "model_finetune", "compare_models", "export_gguf", "test_flops"])
def test_main_of_each_script_with_a_wrong_checkpoint_is_one_line(
    name, checkpoint, tmp_path, text_file, instruction_file, monkeypatch
):
    # The export would refuse the tokenizer of the tests before it reads the weights.
    monkeypatch.setattr(export_gguf, "read_vocabulary", lambda *args: None)
    for message, model in wrong_checkpoints(tmp_path, checkpoint).items():
        if name == "export_gguf" and ("newer" in message or "novel" in message):
            continue  # refused by its own lists of rotary embeddings and activations
        with pytest.raises(UserError, match=message) as error:
            script(name, model, tmp_path, text_file, instruction_file)
        assert "\n" not in str(error.value) and str(model) in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.gguf").exists()


def test_load_config_with_remote_code_of_a_missing_package_names_it(checkpoint, tmp_path):
    model = configured(tmp_path / "m", checkpoint, model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    code = "import not_installed_anywhere\nfrom transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    pass\n"
    (model / "mine.py").write_text(code)
    with pytest.raises(UserError, match="not_installed_anywhere") as error:
        load_config(str(model), True)
    assert "\n" not in str(error.value)


def test_load_tokenizer_that_fails_keeps_the_reason(checkpoint, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(checkpoint, model)
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Novel"}}')
    with pytest.raises(UserError, match=r"cannot be loaded: .{12}") as error:
        load_tokenizer(str(model), False)
    assert "\n" not in str(error.value) and not str(error.value).endswith(":")


@pytest.mark.parametrize("nested", [False, True])
def test_load_model_of_quantised_weights_is_refused(nested, checkpoint, tmp_path):
    """Also if the library could load them: they would be saved without their scales."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    key = "compression_config" if nested else "quantization_config"
    model = configured(tmp_path / "m", checkpoint, **{key: settings})
    with pytest.raises(UserError, match=r"quantised \(fp8\)"):
        load_model(str(model), "auto", False)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "novel"}, "novel"),
    ],
)
def test_load_config_of_quantised_weights_names_method_and_base(settings, method, checkpoint, tmp_path):
    model = configured(tmp_path / "m", checkpoint, quantization_config=settings)
    message = rf"quantised \({method}\); use the unquantised checkpoint{{}}, and quantise the pruned model afterwards"
    with pytest.raises(UserError, match=message.format("")):
        load_config(str(model), False)
    (model / "README.md").write_text("---\nbase_model:\n- some/base\n---\n")
    with pytest.raises(UserError, match=message.format(", some/base by its card")):
        load_config(str(model), False)


@pytest.fixture(scope="module")
def untied_head(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint with an untied head whose configuration ties it to the embeddings."""
    path = tmp_path_factory.mktemp("models") / "own-head"
    make_tiny("tied").save_pretrained(path)
    tokenizer.save_pretrained(path)
    state = load_file(path / WEIGHTS)
    head = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    save_file(state | {"lm_head.weight": head}, path / WEIGHTS, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_model_slimming_of_a_tied_model_with_an_untied_head_keeps_the_head(
    flags, untied_head, text_file, tmp_path, samples
):
    head = load_file(untied_head / WEIGHTS)["lm_head.weight"]
    argv = [untied_head, "--data_file", text_file, "--num_samples", 4, "--seqlen", 16, "--device", "cpu", *flags]
    argv += ["--sparsity", 0.5, "--save_pruned_weights", "--save_dir", tmp_path / "out", "--eval_datasets", text_file]
    model_slimming.main(model_slimming.build_parser().parse_args([*map(str, argv), "--eval_seqlens", "16"]))
    logits = []
    for folder in (tmp_path / "out", tmp_path / "out" / "pruned_weights"):
        # By the library alone: what is saved is what others read.
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight, head)
        logits.append(model(samples).logits)
    assert torch.allclose(*logits, atol=1e-4)


def test_load_model_of_a_pickled_tied_model_with_an_untied_head_clears_the_flag(untied_head, tmp_path):
    """Only the library has read both matrices here."""
    shutil.copytree(untied_head, tmp_path / "bin")
    torch.save(load_file(untied_head / WEIGHTS), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / WEIGHTS).unlink()
    assert not load_model(str(tmp_path / "bin"), "auto", False).config.tie_word_embeddings
    host = OffloadedModel(str(tmp_path / "bin"), "auto", False, tmp_path / "scratch")
    assert not host.model.config.tie_word_embeddings
    with host.non_layer_modules():
        assert not torch.equal(host.model.lm_head.weight, host.model.model.embed_tokens.weight)
    host.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_config_of_a_tied_model_that_stores_its_head_twice_keeps_the_flag(dtype, untied_head, tmp_path):
    def twice(state: State) -> State:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

    stored(tmp_path / "m", untied_head, twice)
    assert load_config(str(tmp_path / "m"), False).tie_word_embeddings
    assert load_model(str(tmp_path / "m"), "auto", False).config.tie_word_embeddings


@pytest.mark.parametrize("equal", [False, True])
def test_load_model_of_an_untied_model_keeps_both_matrices(equal, untied_head, tmp_path):
    model = configured(tmp_path / "m", untied_head, tie_word_embeddings=False)
    state = load_file(model / WEIGHTS)
    embeddings = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embeddings.clone() if equal else state["lm_head.weight"]
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    loaded = load_model(str(model), "auto", False)
    host = OffloadedModel(str(model), "auto", False, tmp_path / "scratch")
    with host.non_layer_modules():
        for untied in (loaded, host.model):
            assert not untied.config.tie_word_embeddings
            assert untied.lm_head.weight is not untied.model.embed_tokens.weight
            assert torch.equal(untied.lm_head.weight, state["lm_head.weight"])
    host.close()


def test_test_flops_of_a_tied_model_with_an_untied_head_counts_the_head(untied_head, capsys):
    argv = ["--base_model", str(untied_head), "--seqlen", "4"]
    test_flops.main(test_flops.build_parser().parse_args(argv))
    expected = sum(tensor.numel() for tensor in load_file(untied_head / WEIGHTS).values())
    assert f"{'parameters (M)':24}{expected / 1e6:12.2f}" in capsys.readouterr().out
    assert model_stats(load_config(str(untied_head), False)).parameters == expected
