"""LoRA adapters and GGUF files as the model."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import model_slimming
from slim_utils.common import model_source
from slim_utils.common.errors import UserError
from slim_utils.common.gguf_config import complete_config
from slim_utils.common.loading import load_config, load_model, load_tokenizer
from slim_utils.common.model_source import check_input
from slim_utils.layerwise.offload import OffloadedModel
from tests.conftest import WORDS, word_tokenizer
from tests.gguf_files import AWKWARD, BYTE_LEVEL, TEXTS, byte_level, export, save_pruned
from tests.tiny_models import make_tiny
from tests.unit.common.test_checkpoint_checks import script


def saved_adapter(folder: Path, base: Path, **options: object) -> Path:
    """A random LoRA adapter of ``base``."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "down_proj"]} | options)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def rewritten(folder: Path, **fields: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def prune(model: Path, text_file: Path, out: Path, *flags: object) -> None:
    argv = [model, "--data_file", text_file, "--num_samples", 4, "--seqlen", 16, "--device", "cpu", "--skip_evaluate"]
    argv += ["--sparsity", 0.3, "--save_pruned_weights", "--save_dir", out, *flags]
    model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_load_model_of_an_adapter_merges_it(options, checkpoint, tmp_path, samples, caplog):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint, **options)
    caplog.set_level(logging.INFO)
    model = load_model(str(adapter), "auto", False)
    assert "adapter: LoRA adapter, merged into tiny-llama" in caplog.text
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).eval()
    with torch.no_grad():
        assert torch.allclose(model(samples).logits, expected(samples).logits, atol=1e-4)
    assert type(model) is type(expected.get_base_model()) and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    # What is trained on it has it as its base.
    assert model.config.name_or_path == model.name_or_path == str(adapter)
    # The tokenizer is that of the base.
    assert load_tokenizer(str(adapter), False).get_vocab() == load_tokenizer(str(checkpoint), False).get_vocab()


@pytest.mark.parametrize("on_hub", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_load_tokenizer_of_an_adapter_is_its_own_or_that_of_the_base(on_hub, stored, checkpoint, tmp_path, monkeypatch):
    name = f"some/adapter-{stored}"
    cached = tmp_path / f"models--{name.replace('/', '--')}"
    adapter = saved_adapter(cached / "snapshots" / ("0" * 40), checkpoint)
    if stored:
        word_tokenizer({**WORDS, "more": len(WORDS)}).save_pretrained(adapter)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded, model = [], name if on_hub else str(adapter)
    load = AutoTokenizer.from_pretrained
    # Only the choice is tested on the hub, whose missing files a hand-made cache does not know.
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda path, **_: loaded.append(path) or load(adapter if stored else checkpoint),
    )
    tokenizer = load_tokenizer(model, False)
    assert loaded == [model if stored else str(checkpoint)]
    assert ("more" in tokenizer.get_vocab()) == stored


def test_load_model_of_an_adapter_reads_its_base_once(checkpoint, tmp_path, monkeypatch):
    adapter, read = saved_adapter(tmp_path / "adapter", checkpoint), []
    monkeypatch.setattr(model_source, "check_weight_files", lambda folder: read.append(folder) or ("float32",))
    load_model(str(adapter), "auto", False)
    assert read == [checkpoint]


def test_load_model_of_an_adapter_of_a_damaged_base_names_both(checkpoint, tmp_path):
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    adapter = saved_adapter(tmp_path / "adapter", base)
    (base / "model.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match=rf"model {adapter}: model {base}: .* damaged or incomplete.*; its adapter_con"):
        load_model(str(adapter), "auto", False)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_load_model_of_an_adapter_that_stores_a_tied_matrix_unties_it(saved, tmp_path, samples):
    make_tiny("tied").save_pretrained(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "adapter", tmp_path / "base", modules_to_save=[saved])
    weights = load_file(adapter / "adapter_model.safetensors")
    changed = {name: tensor + 0.5 if saved in name else tensor for name, tensor in weights.items()}
    save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    load_model(str(adapter), "auto", False).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(samples).logits, expected(samples).logits, atol=1e-4)


def test_model_slimming_of_an_adapter_records_it(checkpoint, text_file, tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint)
    prune(adapter, text_file, tmp_path / "of_adapter")
    masked = load_file(tmp_path / "of_adapter" / "model.safetensors")
    merged = load_model(str(adapter), "auto", False).state_dict()
    # Maps whose rows are removed, not updated.
    name = "model.layers.1.mlp.gate_proj.weight"
    kept = masked[name].any(1)
    assert not kept.all() and torch.equal(masked[name][kept], merged[name][kept])
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = masked[name].any(1)
    assert not kept.all() and torch.equal(masked[name][kept], merged[name][kept])
    provenance = json.loads((tmp_path / "of_adapter" / "run.json").read_text())["provenance"]
    assert provenance["base"]["name"] == "tiny-llama"
    step = {"model": "adapter", "format": "LoRA adapter, merged into tiny-llama"}
    assert provenance["steps"][0]["settings"] == step
    assert "| format | LoRA adapter, merged into tiny-llama |" in (
        tmp_path / "of_adapter" / "pruned_weights" / "README.md"
    ).read_text(encoding="utf-8")


def test_model_slimming_of_an_adapter_whose_base_lies_in_the_output_is_refused(checkpoint, text_file, tmp_path):
    prune(checkpoint, text_file, tmp_path / "out")
    adapter = saved_adapter(tmp_path / "adapter", tmp_path / "out" / "pruned_weights")
    with pytest.raises(UserError, match=r"MODEL .*pruned_weights: inside --save_dir .*; choose another --save_dir"):
        prune(adapter, text_file, tmp_path / "out", "--overwrite")


def test_load_config_of_an_unusable_adapter_is_one_line(checkpoint, tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint)
    cases = {
        r"model .*nowhere: no such folder; its adapter_config.json sets base_model_name_or_path": {
            "base_model_name_or_path": str(tmp_path / "nowhere")
        },
        "an adapter without a base; set base_model_name_or_path": {"base_model_name_or_path": None},
        "an adapter without a base; set base_model_name": {"base_model_name_or_path": str(adapter)},
        "an adapter of type IA3; only LoRA": {"peft_type": "IA3"},
        "an adapter on parameters of experts": {"target_parameters": ["experts.down_proj"]},
    }
    for index, (message, fields) in enumerate(cases.items()):
        wrong = rewritten(Path(shutil.copytree(adapter, tmp_path / f"a{index}")), **fields)
        if fields.get("base_model_name_or_path") == str(adapter):
            rewritten(wrong, base_model_name_or_path=str(wrong))
        with pytest.raises(UserError, match=message) as error:
            load_config(str(wrong), False)
        assert "\n" not in str(error.value) and str(wrong) in str(error.value)
    first = rewritten(adapter, base_model_name_or_path=str(tmp_path / "loop"))
    rewritten(Path(shutil.copytree(adapter, tmp_path / "loop")), base_model_name_or_path=str(first))
    for load in (load_config, load_tokenizer, lambda path, trusted: load_model(path, "auto", trusted)):
        with pytest.raises(UserError, match="adapters that are bases of each other"):
            load(str(first), False)


def test_load_model_of_a_damaged_adapter_is_one_line(checkpoint, tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"model {adapter}: cannot be loaded") as error:
        load_model(str(adapter), "auto", False)
    assert "\n" not in str(error.value)
    (adapter / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=rf"model {adapter}: model.safetensors.index.json: damaged"):
        load_config(str(adapter), False)
    shutil.copyfile(checkpoint / "model.safetensors", adapter / "model.safetensors")
    with pytest.raises(UserError, match=r"has weights of a model and adapter_config\.json"):
        load_config(str(adapter), False)


@pytest.fixture(scope="module")
def gguf_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level("llama-bpe")


@pytest.fixture(scope="module")
def dense(tmp_path_factory, gguf_tokenizer) -> Path:
    """A tiny LLaMA on disk whose tokenizer can be exported."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    # Rows of whole blocks.
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
    make_tiny("gqa", vocab_size=len(gguf_tokenizer), **sizes).save_pretrained(folder)
    gguf_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(dense) -> Path:
    """``dense`` as a GGUF file in fp32."""
    export(dense, "--outtype", "f32")
    return dense.with_name("model.gguf")


def test_load_model_of_a_gguf_file_equals_the_exported_checkpoint(gguf_file, dense, samples, caplog):
    caplog.set_level(logging.INFO)
    model, expected = load_model(str(gguf_file), "auto", False), AutoModelForCausalLM.from_pretrained(dense)
    assert f"model {gguf_file}: GGUF file (F32)" in caplog.text
    with torch.no_grad():
        assert torch.allclose(model(samples).logits, expected(samples).logits, atol=1e-4)


@pytest.mark.parametrize("scale", [8, 256])
def test_load_model_of_a_gguf_file_of_gemma_has_its_scale_and_soft_caps(scale, gguf_tokenizer, samples, tmp_path):
    settings = {"query_pre_attn_scalar": scale, "final_logit_softcapping": 10.0, "head_dim": 8}
    expected = make_tiny("gemma2", vocab_size=len(gguf_tokenizer), **settings)
    expected.save_pretrained(tmp_path / "dense")
    gguf_tokenizer.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", "--outtype", "f32")
    model = load_model(str(tmp_path / "model.gguf"), "auto", False)
    with torch.no_grad():
        assert torch.allclose(model(samples).logits, expected(samples).logits, atol=1e-4)


def test_complete_config_with_another_base_of_the_rotary_embeddings_is_refused(gguf_file):
    config = load_config(str(gguf_file), False)
    config.rope_parameters["rope_theta"] = 5e5
    with pytest.raises(UserError, match="have the base 10000, but transformers reads 500000; use the checkpoint"):
        complete_config(config, str(gguf_file))


@pytest.mark.parametrize("rule", BYTE_LEVEL)
def test_load_tokenizer_of_a_gguf_file_gives_the_tokens_of_the_exported_checkpoint(rule, tmp_path):
    original = byte_level(rule)
    # In the file it is another kind of token than those for the begin and the end.
    original.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    make_tiny("gqa", vocab_size=len(original)).save_pretrained(tmp_path / "dense")
    original.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", "--outtype", "f32")
    tokenizer = load_tokenizer(str(tmp_path / "model.gguf"), False)
    for text in (*TEXTS, *AWKWARD):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False), text


def test_model_slimming_of_a_quantised_gguf_file_is_dequantised(dense, text_file, tmp_path, samples):
    shutil.copytree(dense, tmp_path / "dense")
    export(tmp_path / "dense", "--outtype", "q8_0")
    prune(tmp_path / "model.gguf", text_file, tmp_path / "out")
    masked, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in (".", "pruned_weights"))
    with torch.no_grad():
        assert torch.allclose(masked(samples).logits, pruned(samples).logits, atol=1e-4)
    assert not hasattr(pruned.config, "quantization_config")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["provenance"]["base"]["name"] == "model.gguf" and not run["provenance"]["base"]["on_hub"]
    assert run["provenance"]["steps"][0]["settings"]["format"] == "GGUF file (Q8_0), dequantised"


def test_check_input_of_a_divided_model_names_the_flags(gguf_file, checkpoint, tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint)
    for model in (gguf_file, adapter):
        with pytest.raises(UserError, match="is loaded as a whole; leave out --stream, --parallelize"):
            check_input(str(model), divided=True)
        with pytest.raises(UserError, match="is loaded as a whole"):
            OffloadedModel(str(model), "auto", False, tmp_path / "scratch")


def test_load_config_of_an_unusable_gguf_file_is_one_line(gguf_file, gguf_tokenizer, tmp_path):
    def written(name: str, architecture: str, parts: int = 1) -> Path:
        writer = GGUFWriter(tmp_path / name, architecture)
        writer.add_block_count(1)
        writer.add_uint16("split.count", parts)
        writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    size = {"vocab_size": len(gguf_tokenizer)}
    for name, variant, uniform, overrides in (
        ("scaled", "llama3_rope", True, {}),
        ("biased", "biases", True, {}),
        ("layers", "gqa", False, {}),
        ("linear", "gqa", True, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ):
        save_pruned(tmp_path / name / "m", gguf_tokenizer, variant, uniform, **size, **overrides)
        export(tmp_path / name / "m")
    for name, content in (("cut", gguf_file.read_bytes()[:-900]), ("html", b"<html>" * 99), ("empty", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
    cases = {
        "no such file": tmp_path / "absent.gguf",
        r"damaged, incomplete \([\d,]+ bytes\) or not a GGUF file": tmp_path / "cut.gguf",
        r"damaged, incomplete \(594 bytes\)": tmp_path / "html.gguf",
        r"damaged, incomplete \(0 bytes\)": tmp_path / "empty.gguf",
        "one of 3 parts; join them by llama-gguf-split": written("part.gguf", "llama", 3),
        "GGUF model with architecture novel is not supported": written("novel.gguf", "novel"),
        r"a GGUF file of model type 'mamba' is not supported \(supported: llama, ": written("mamba.gguf", "mamba"),
        r"scaling of its rotary embeddings \(rope_freqs.weight\); use the checkpoint": tmp_path / "scaled/model.gguf",
        r"scaling of its rotary embeddings \(rope.scaling.type linear\)": tmp_path / "linear/model.gguf",
        "does not read per-layer shapes from GGUF": tmp_path / "layers/model.gguf",
        r"[\d,]+ weights, but transformers reads a llama of [\d,]+; use": tmp_path / "biased/model.gguf",
    }
    assert GGUFReader(tmp_path / "layers/model.gguf").fields["general.architecture"].contents() == "deci"
    for message, model in cases.items():
        with pytest.raises(UserError, match=message) as error:
            load_config(str(model), False)
        assert "\n" not in str(error.value) and str(model) in str(error.value)


@pytest.mark.slow
def test_model_finetune_of_an_adapter_trains_the_merged_model(checkpoint, tmp_path, text_file, instruction_file):
    adapter = saved_adapter(tmp_path / "adapter", checkpoint)
    script("model_finetune", adapter, tmp_path, text_file, instruction_file)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["provenance"]["steps"][0]["settings"]["format"] == "LoRA adapter, merged into tiny-llama"
    assert record["parameters"] == record["trained_parameters"]
