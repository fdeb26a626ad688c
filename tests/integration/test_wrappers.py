"""Multimodal checkpoints: their language model alone, or pruned beside their vision tower."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Qwen3_5Tokenizer

import model_evaluate
import model_slimming
import test_flops
from models.wrappers import OTHER_PARTS, WRAPPER_ROWS, find_wrapper
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_config, load_model
from slim_utils.families import find_family
from tests.processes import run_python
from tests.tiny_models import VOCAB, make_tiny
from tests.wrappers import TINY_WRAPPERS, image_inputs, make_wrapper, text_logits

ROOT = Path(__file__).resolve().parents[2]
# M-RoPE, tied embeddings and a head dimension that the hidden size sets; experts. The others are slow.
DEFAULT_TIER = ("qwen2_5_vl", "llama4")
NAMES = [name if name in DEFAULT_TIER else pytest.param(name, marks=pytest.mark.slow) for name in TINY_WRAPPERS]


def flags(*argv: object) -> argparse.Namespace:
    return model_slimming.build_parser().parse_args(list(map(str, argv)))


@pytest.fixture
def run(text_file) -> list:
    """Flags of a run without model, ratio and output."""
    return ["--data_file", text_file, "--num_samples", 16, "--seqlen", 16, "--device", "cpu", "--skip_evaluate"]


@pytest.fixture
def samples():
    """(4, 16) random token ids, none of them of an image."""
    return torch.randint(3, VOCAB - 4, (4, 16), generator=torch.Generator().manual_seed(1))


def save_wrapper(name: str, folder: Path, tokenizer, **options) -> None:
    make_wrapper(name).save_pretrained(folder, **options)
    if name.startswith("qwen3_5"):
        # By its model type, the library chooses this class whatever was saved.
        characters = ["<|endoftext|>", "<s>", "</s>", "w", "Ġ", *map(str, range(10))]
        tokenizer = Qwen3_5Tokenizer(vocab={character: index for index, character in enumerate(characters)})
    tokenizer.save_pretrained(folder)


def test_wrappers_of_the_table_are_those_tested():
    tested = [(name.partition(" ")[0], config["text_config"]["model_type"]) for name, config in TINY_WRAPPERS.items()]
    assert list(dict.fromkeys(tested)) == [(wrapper.base_type, wrapper.family.base_type) for wrapper in WRAPPER_ROWS]
    documented = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").partition("## Multimodal")[2]
    assert all(f"`{base_type}`" in documented and f"`{text_type}`" in documented for base_type, text_type in tested)


@pytest.mark.parametrize("published", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TINY_WRAPPERS)
def test_load_model_of_a_language_model_has_the_logits_of_the_wrapper(name, published, samples, tmp_path):
    wrapper = make_wrapper(name)
    wrapper.save_pretrained(tmp_path, save_original_format=published)
    model = load_model(str(tmp_path), "auto", False, language_model=True)
    find_family(model.config)
    expected = text_logits(wrapper, samples)
    with torch.no_grad():
        logits = model(samples).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_load_model_of_transposed_experts_leaves_other_checkpoints_as_they_are(samples, tmp_path):
    text, wrapper = make_tiny("qwen3_moe"), make_wrapper("qwen3_vl_moe")
    text.save_pretrained(tmp_path / "text")
    wrapper.save_pretrained(tmp_path / "wrapper")
    # As published; the library saves them as they are in the model.
    file = tmp_path / "wrapper" / "model.safetensors"
    state = {name: w.mT.contiguous() if ".mlp.experts." in name else w for name, w in load_file(file).items()}
    assert sum(state[name].shape != w.shape for name, w in load_file(file).items()) == 2 * 3
    save_file(state, file, metadata={"format": "pt"})
    alone = load_model(str(tmp_path / "wrapper"), "auto", False, language_model=True)
    with torch.no_grad():
        expected, logits = text_logits(wrapper, samples), alone(samples).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    alone.save_pretrained(tmp_path / "alone")
    for folder, model in (("text", text), ("alone", alone)):
        again = load_model(str(tmp_path / folder), "auto", False)
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_model_slimming_text_only_saves_the_language_model(name, run, samples, tokenizer, tmp_path, caplog):
    save_wrapper(name, tmp_path / "wrapper", tokenizer)
    run = [tmp_path / "wrapper", *run, "--text_only", "--save_pruned_weights"]
    ratios = ["--non_uniform", "--min_sparsity", 0.3, "--max_sparsity", 0.6]
    with caplog.at_level("INFO"):
        model_slimming.main(flags(*run, *ratios, "--save_dir", tmp_path / "out"))
    assert f"--text_only: only the language model of the '{name.partition(' ')[0]}' is used" in caplog.text
    masked, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / part) for part in (".", "pruned_weights"))
    assert masked.config.model_type == find_wrapper(make_wrapper(name).config).alone
    assert not any("vision" in key or "visual" in key for key in masked.state_dict())
    with torch.no_grad():
        expected, logits = masked(samples).logits, pruned(samples).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (expected - text_logits(make_wrapper(name), samples)).abs().max() > 1e-2 * expected.abs().max()
    card = (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert f"(`{name.partition(' ')[0]}`), such as its vision tower, are left out" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_WRAPPERS)
def test_model_slimming_text_only_streamed_gives_the_same_weights(name, run, tokenizer, tmp_path):
    save_wrapper(name, tmp_path / "wrapper", tokenizer, max_shard_size="20KB")
    run = [tmp_path / "wrapper", *run, "--text_only", "--save_pruned_weights", "--sparsity", 0.4]
    model_slimming.main(flags(*run, "--save_dir", tmp_path / "whole"))
    model_slimming.main(flags(*run, "--save_dir", tmp_path / "streamed", "--stream"))
    for part in (".", "pruned_weights"):
        whole, streamed = (
            AutoModelForCausalLM.from_pretrained(tmp_path / folder / part).state_dict()
            for folder in ("whole", "streamed")
        )
        assert whole.keys() == streamed.keys()
        assert all(torch.equal(whole[key], streamed[key]) for key in whole)


def test_model_slimming_text_only_without_pruning_is_the_wrapper(run, samples, tokenizer, tmp_path):
    save_wrapper("gemma3", tmp_path / "wrapper", tokenizer)
    # As processors were saved, whose template tokenizers do not read.
    (tmp_path / "wrapper" / "chat_template.jinja").rename(tmp_path / "template")
    template = (tmp_path / "template").read_text()
    (tmp_path / "wrapper" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model_slimming.main(flags(tmp_path / "wrapper", *run, "--text_only", "--save_dir", tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "gemma3_text"
    with torch.no_grad():
        assert torch.equal(model(samples).logits, text_logits(make_wrapper("gemma3"), samples))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


# Loads every given folder in a process without access to this repository; compares logits and generation.
LOADER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
for folder in map(Path, sys.argv[1:]):
    inputs = load_file(folder.parent / "expected.safetensors")
    logits = inputs.pop("logits")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__.startswith("Slim"), type(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits), folder
    if "PaliGemma" in type(model).__name__:
        # Without a cache, the library lets its prompt attend to what is generated.
        continue
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(**inputs, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain), folder
"""


@pytest.mark.parametrize("name", NAMES)
def test_model_slimming_of_a_wrapper_keeps_its_vision_tower(name, run, samples, tokenizer, tmp_path):
    save_wrapper(name, tmp_path / "wrapper", tokenizer)
    (tmp_path / "wrapper" / "preprocessor_config.json").write_text("{}")
    run = [tmp_path / "wrapper", *run, "--save_pruned_weights", "--non_uniform", "--min_sparsity", 0.3]
    model_slimming.main(flags(*run, "--max_sparsity", 0.6, "--save_dir", tmp_path / "out"))
    dense, masked, pruned = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        for folder in ("wrapper", "out", "out/pruned_weights")
    )
    inputs = image_inputs(dense)
    with torch.no_grad():
        expected, logits = masked(**inputs).logits, pruned(**inputs).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (dense(**inputs).logits - expected).abs().max() > 1e-2 * expected.abs().max()
        inputs["pixel_values"] = inputs["pixel_values"] + 1
        assert (pruned(**inputs).logits - logits).abs().max() > 1e-2 * expected.abs().max()
        logits = pruned(**inputs).logits
    expected = text_logits(masked, samples)
    assert (text_logits(pruned, samples) - expected).abs().max() <= 1e-4 * expected.abs().max()
    others = [key for key in dense.state_dict() if re.match(OTHER_PARTS, key)]
    assert others and all(torch.equal(pruned.state_dict()[key], dense.state_dict()[key]) for key in others)
    assert (tmp_path / "out" / "pruned_weights" / "preprocessor_config.json").read_text() == "{}"
    card = (tmp_path / "out" / "pruned_weights" / "README.md").read_text()
    assert 'AutoModelForImageTextToText.from_pretrained("DIR", trust_remote_code=True)' in card
    save_file({**inputs, "logits": logits}, tmp_path / "out" / "expected.safetensors")
    process = run_python("-c", LOADER, tmp_path / "out" / "pruned_weights", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    # Its language model again, by itself.
    alone = load_model(str(tmp_path / "out" / "pruned_weights"), "auto", False, language_model=True)
    with torch.no_grad():
        assert (alone(samples).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_model_slimming_of_an_adapter_of_a_wrapper_is_refused(run, tokenizer, tmp_path):
    save_wrapper("gemma3", tmp_path / "wrapper", tokenizer)
    (tmp_path / "adapter").mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "wrapper")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="adapter: an adapter of a multimodal 'gemma3'; merge it into its base first"):
        model_slimming.main(flags(tmp_path / "adapter", *run, "--sparsity", 0.5, "--save_dir", tmp_path / "out"))


def test_model_slimming_of_a_wrapper_with_uniform_shapes_is_a_stock_model(run, tokenizer, tmp_path):
    save_wrapper("gemma3", tmp_path / "wrapper", tokenizer)
    run = [tmp_path / "wrapper", *run, "--save_pruned_weights", "--uniform_shapes"]
    model_slimming.main(flags(*run, "--sparsity", 0.5, "--save_dir", tmp_path / "out"))
    folder = tmp_path / "out" / "pruned_weights"
    masked, pruned = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path / "out", folder))
    assert not list(folder.glob("*.py")) and pruned.config.model_type == "gemma3"
    assert pruned.config.text_config.num_attention_heads == 3
    inputs = image_inputs(pruned)
    with torch.no_grad():
        expected = masked(**inputs).logits
        assert (pruned(**inputs).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_model_slimming_of_a_pruned_wrapper_prunes_it_again(run, tokenizer, tmp_path):
    save_wrapper("qwen2_5_vl", tmp_path / "wrapper", tokenizer)
    run = [*run, "--save_pruned_weights", "--sparsity", 0.3]
    model_slimming.main(flags(tmp_path / "wrapper", *run, "--save_dir", tmp_path / "first"))
    model_slimming.main(flags(tmp_path / "first" / "pruned_weights", *run, "--save_dir", tmp_path / "second"))
    first, masked, pruned = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        for folder in ("first/pruned_weights", "second", "second/pruned_weights")
    )
    assert pruned.num_parameters() < first.num_parameters() == masked.num_parameters()
    inputs = image_inputs(first)
    with torch.no_grad():
        expected = masked(**inputs).logits
        assert (pruned(**inputs).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_wrapper_flags_and_scripts_that_do_not_fit_are_refused(run, tokenizer, tmp_path):
    save_wrapper("qwen2_vl", tmp_path / "wrapper", tokenizer)
    run = [tmp_path / "wrapper", *run, "--sparsity", 0.5, "--save_pruned_weights", "--save_dir", tmp_path / "out"]
    with pytest.raises(UserError, match=r"--stream: not with the vision tower of a 'qwen2_vl'; .* add --text_only"):
        model_slimming.main(flags(*run, "--stream"))
    with pytest.raises(UserError, match="--uniform_shapes: a stock qwen2_vl_text cannot have"):
        model_slimming.main(flags(*run, "--uniform_shapes"))
    with pytest.raises(UserError, match=r"'qwen2_vl' is a multimodal model; .* model_slimming.py --text_only"):
        test_flops.main(test_flops.build_parser().parse_args(["--base_model", str(tmp_path / "wrapper")]))


def test_model_finetune_of_a_wrapper_is_refused_in_one_line(tokenizer, instruction_file, tmp_path):
    save_wrapper("gemma3", tmp_path / "wrapper", tokenizer)
    argv = ["--model_name_or_path", tmp_path / "wrapper", "--data_path", instruction_file, "--use_cpu", "true"]
    argv += ["--prompt_template_name", "none", "--output_dir", tmp_path / "out"]
    process = run_python("model_finetune.py", *map(str, argv))
    assert process.returncode == 2
    *_, last = process.stderr.strip().splitlines()
    assert "'gemma3' is a multimodal model; use its language model, which model_slimming.py --text_only saves" in last
    assert "Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("cached_task_index")
def test_model_evaluate_of_a_wrapper_evaluates_its_language_model(tokenizer, data_dir, tmp_path, caplog, monkeypatch):
    # Qwen2 requires another tokenizer class.
    monkeypatch.setattr(model_evaluate, "load_tokenizer", lambda *args: tokenizer)
    save_wrapper("qwen2_5_vl", tmp_path / "wrapper", tokenizer)
    load_model(str(tmp_path / "wrapper"), "auto", False, language_model=True).save_pretrained(tmp_path / "text")
    results = []
    for folder in ("wrapper", "text"):
        argv = [
            "--model",
            tmp_path / folder,
            "--tasks",
            "piqa",
            "--data_dir",
            data_dir,
            "--device",
            "cpu",
            "--limit",
            4,
        ]
        argv += ["--output_path", tmp_path / "out.json", "--overwrite"]
        with caplog.at_level("INFO"):
            model_evaluate.main(model_evaluate.build_parser().parse_args(list(map(str, argv))))
        results.append(json.loads((tmp_path / "out.json").read_text())["results"])
    assert results[0] == results[1]
    assert "its language model, a 'qwen2', is evaluated" in caplog.text


def test_text_only_of_a_text_model_is_refused(run, checkpoint):
    with pytest.raises(UserError, match="--text_only: the model is a language model already; leave it out"):
        model_slimming.main(flags(checkpoint, *run, "--text_only"))


def test_language_model_of_an_unsupported_type_is_refused_by_name(tokenizer, tmp_path):
    config = AutoConfig.for_model("mistral3", text_config={"model_type": "gpt2"})
    config.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="its language model is a 'gpt2', which is not supported in a 'mistral3'"):
        load_config(str(tmp_path / "gpt2"), False, language_model=True)
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path / "gemma3n")
    with pytest.raises(UserError, match="model type 'gemma3n' is multimodal and not supported; supported multimodal"):
        find_family(load_config(str(tmp_path / "gemma3n"), False, language_model=True))
