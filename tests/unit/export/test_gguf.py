"""GGUF files read back: shapes, weights, metadata, and models that llama.cpp does not support."""

import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slim_utils.common.errors import UserError
from slim_utils.export.gguf import check_exportable, interleave_halves
from slim_utils.export.gguf_metadata import rope_tensors
from slim_utils.families import layer_shapes
from tests.conftest import random_text
from tests.gguf_files import export, save_pruned, values
from tests.tiny_models import TINY_VARIANTS, make_tiny


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([random_text(500)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )


def save(tmp_path, bpe, variant="gqa", uniform=False, **overrides):
    """Save a pruned model of ``variant`` with the tokenizer; the model and its folder."""
    folder = tmp_path / "model"
    return save_pruned(folder, bpe, variant, uniform, **{"vocab_size": 310, **overrides}), folder


@pytest.mark.parametrize("uniform", [False, True])
def test_export_has_shapes_weights_and_tokens_of_the_model(tmp_path, bpe, uniform):
    pruned, folder = save(tmp_path, bpe, uniform=uniform)
    reader = export(folder, "--outtype", "f32")
    keys = values(reader)
    arch = "llama" if uniform else "deci"
    assert keys["general.architecture"] == arch
    shapes = layer_shapes(pruned.config)
    for key, name in (
        ("attention.head_count", "num_heads"),
        ("attention.head_count_kv", "num_kv_heads"),
        ("feed_forward_length", "num_columns"),
    ):
        expected = [getattr(shape, name) for shape in shapes]
        assert keys[f"{arch}.{key}"] == (expected[0] if uniform else expected)
    assert keys[f"{arch}.attention.key_length"] == keys[f"{arch}.rope.dimension_count"] == 4
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layer = pruned.model.layers[2]
    assert torch.equal(tensors["blk.2.ffn_down.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(tensors["blk.2.attn_output.weight"], layer.self_attn.o_proj.weight)
    assert torch.equal(tensors["token_embd.weight"], pruned.model.embed_tokens.weight)
    queries = layer.self_attn.q_proj.weight
    assert torch.equal(tensors["blk.2.attn_q.weight"], interleave_halves(queries, shapes[2].num_heads))
    assert len(tensors) == len(pruned.state_dict())

    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert keys["tokenizer.ggml.tokens"][bpe.convert_tokens_to_ids("w")] == "w"
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD309]"
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def test_export_of_tied_embeddings_writes_them_once(tmp_path, bpe):
    _, folder = save(tmp_path, bpe, "tied")
    assert "output.weight" not in {tensor.name for tensor in export(folder).tensors}


def test_export_of_an_untied_head_writes_it_despite_the_flag(tmp_path, bpe):
    pruned, folder = save(tmp_path, bpe, "tied")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = torch.randn(pruned.lm_head.weight.shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tensors = {tensor.name: tensor.data for tensor in export(folder, "--outtype", "f32").tensors}
    assert torch.equal(torch.from_numpy(tensors["output.weight"].copy()), state["lm_head.weight"])
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight"].copy()), state["model.embed_tokens.weight"])


def test_export_has_general_metadata(tmp_path, bpe):
    pruned, folder = save(tmp_path, bpe)
    for inner, name in (("model", "model"), ("Tiny-p20/pruned_weights", "Tiny-p20"), ("Tiny/lora_fused_model", "Tiny")):
        (tmp_path / inner).parent.mkdir(exist_ok=True)
        folder = folder.rename(tmp_path / inner)
        keys = values(export(folder))
        assert keys["general.name"] == name
    assert keys["general.type"] == "model" and keys["general.file_type"] == 1
    assert keys["general.size_label"] == f"{sum(p.numel() for p in pruned.parameters()) / 1e3:.0f}K"
    assert keys["general.quantization_version"] == 2


@pytest.mark.parametrize("uniform", [False, True])
def test_export_of_a_sliding_window_sets_the_context_length(tmp_path, bpe, uniform, caplog):
    _, folder = save(tmp_path, bpe, "mistral", uniform)
    keys, arch = values(export(folder)), "llama" if uniform else "deci"
    assert keys[f"{arch}.context_length"] == keys[f"{arch}.attention.sliding_window"] == 8
    assert "the context length is set to the window, 8 tokens instead of 64" in caplog.text


@pytest.mark.parametrize("window", [None, 64])
def test_export_of_a_window_as_long_as_the_positions_keeps_the_context(tmp_path, bpe, window, caplog):
    _, folder = save(tmp_path, bpe, "mistral", True, sliding_window=window)
    assert values(export(folder))["llama.context_length"] == 64
    assert "window" not in caplog.text


ROPE = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
YARN = ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported by llama\.cpp's deci, which only has silu"),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rotary embeddings 'dynamic' is not supported"),
        (
            {"rope_parameters": YARN | {"attention_factor": 2.0}},
            "rotary embeddings 'yarn' with this attention_factor is not supported",
        ),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial rotary embeddings"),
    ],
)
def test_check_exportable_of_an_unsupported_setting_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check_exportable(make_tiny("gqa", **overrides).config, "f16")


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4_0", 0.3)])
def test_export_with_an_outtype_is_within_its_tolerance(tmp_path, bpe, outtype, tolerance):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    pruned, folder = save(tmp_path, bpe, uniform=True, num_key_value_heads=2, **sizes)
    for tensor in export(folder, "--outtype", outtype).tensors:
        if tensor.name == "blk.1.ffn_up.weight":
            got = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            assert (got - pruned.model.layers[1].mlp.up_proj.weight).abs().max() < tolerance
        if tensor.name.endswith("norm.weight"):
            assert tensor.tensor_type.name == "F32"


def test_interleave_halves_makes_rotary_pairs_adjacent():
    rows = torch.arange(12).view(12, 1)
    assert interleave_halves(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_rope_tensors_of_llama3_match_transformers():
    config = make_tiny("llama3_rope", head_dim=16).config
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
    (factors,) = rope_tensors(config, 16).values()
    assert torch.allclose(plain / torch.from_numpy(factors), scaled, rtol=1e-5)
    assert not rope_tensors(make_tiny("gqa").config, 4)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_export_of_every_variant_works(tmp_path, bpe, variant):
    _, folder = save(tmp_path, bpe, variant)
    assert export(folder).tensors


def test_export_of_an_unsupported_model_is_refused(tmp_path, bpe, tokenizer):
    _, folder = save(tmp_path, bpe)
    with pytest.raises(UserError, match=r"--outtype q8_0 packs blocks of 32 .* prune with --multiple_of 32"):
        export(folder, "--outtype", "q8_0")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another or pass --overwrite"):
        export(folder)
    with pytest.raises(UserError, match="not a GGUF file; not overwritten"):
        export(folder, "--overwrite")
    (tmp_path / "model.gguf").write_text("GGUF of an earlier export")
    export(folder, "--overwrite")
    assert (tmp_path / "model.gguf.Modelfile").read_text().startswith('FROM ./model.gguf\nPARAMETER stop "</s>"\n')
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(UserError, match=r"model\.gguf\.Modelfile: exists"):
        export(folder)
    (tmp_path / "model.gguf.Modelfile").write_text("mine")
    with pytest.raises(UserError, match="not a Modelfile; not overwritten"):
        export(folder, "--overwrite")
    (tmp_path / "model.gguf.Modelfile").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizers of type WordLevel"):
        export(folder)
    assert not (tmp_path / "model.gguf").exists()
    make_tiny("opt").save_pretrained(folder)
    with pytest.raises(UserError, match="model type 'opt' is not supported; supported: llama, mistral"):
        export(folder)
