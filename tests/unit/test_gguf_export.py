"""GGUF files read back: shapes, weights, vocabulary, and what llama.cpp cannot hold."""

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scripts import export_gguf as script
from slim_utils.errors import UserError
from slim_utils.families import find_family, layer_shapes
from slim_utils.gguf_export import interleave_halves, rope_factors
from slim_utils.gguf_vocabulary import pre_tokenizer_name, token_types
from slim_utils.params_remove import shrink
from slim_utils.pruning_record import LayerMask
from tests.conftest import TINY_VARIANTS, make_tiny, random_text

BYTES, LLAMA3 = "ByteLevel", r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s]+"
QWEN2 = r"(?i:'s)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s]+"


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
    """A small model of ``variant`` on disk with the tokenizer; the model and its folder."""
    model = make_tiny(variant, vocab_size=310, **overrides)
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        gone = 0 if uniform else index
        groups = [group for group in range(shape.num_kv_heads) if group != gone % shape.num_kv_heads]
        masks.append(LayerMask.from_groups(shape, groups, list(range(4 * gone, shape.num_columns))))
    small = shrink(model, find_family(model.config), masks, uniform)
    small.save_pretrained(tmp_path / "model")
    bpe.save_pretrained(tmp_path / "model")
    return small, tmp_path / "model"


def export(folder, *flags) -> GGUFReader:
    """Run the script in this process and read what it wrote."""
    out = folder.with_name("model.gguf")
    script.main(script.build_parser().parse_args([str(folder), str(out), *flags]))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "model.gguf"]
    return GGUFReader(out)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_file_holds_the_model(tmp_path, bpe, uniform):
    small, folder = save(tmp_path, bpe, uniform=uniform)
    reader = export(folder, "--outtype", "f32")
    values = {name: field.contents() for name, field in reader.fields.items()}
    arch = "llama" if uniform else "deci"
    assert values["general.architecture"] == arch
    shapes = layer_shapes(small.config)
    for key, name in (
        ("attention.head_count", "num_heads"),
        ("attention.head_count_kv", "num_kv_heads"),
        ("feed_forward_length", "num_columns"),
    ):
        expected = [getattr(shape, name) for shape in shapes]
        assert values[f"{arch}.{key}"] == (expected[0] if uniform else expected)
    assert values[f"{arch}.attention.key_length"] == values[f"{arch}.rope.dimension_count"] == 4
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layer = small.model.layers[2]
    assert torch.equal(tensors["blk.2.ffn_down.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(tensors["blk.2.attn_output.weight"], layer.self_attn.o_proj.weight)
    assert torch.equal(tensors["token_embd.weight"], small.model.embed_tokens.weight)
    queries = layer.self_attn.q_proj.weight
    assert torch.equal(tensors["blk.2.attn_q.weight"], interleave_halves(queries, shapes[2].num_heads))
    assert len(tensors) == len(small.state_dict())

    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert values["tokenizer.ggml.tokens"][bpe.convert_tokens_to_ids("w")] == "w"
    assert values["tokenizer.ggml.tokens"][-1] == "[PAD309]"
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and values["tokenizer.ggml.token_type"][-1] == 5
    assert values["tokenizer.ggml.eos_token_id"] == 1
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == "{{ messages }}"


def test_tied_embeddings_are_written_once(tmp_path, bpe):
    _, folder = save(tmp_path, bpe, "tied")
    assert "output.weight" not in {tensor.name for tensor in export(folder).tensors}


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4_0", 0.3)])
def test_types(tmp_path, bpe, outtype, tolerance):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2}
    small, folder = save(tmp_path, bpe, uniform=True, num_key_value_heads=2, **sizes)
    for tensor in export(folder, "--outtype", outtype).tensors:
        if tensor.name == "blk.1.ffn_up.weight":
            got = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            assert (got - small.model.layers[1].mlp.up_proj.weight).abs().max() < tolerance
        if tensor.name.endswith("norm.weight"):
            assert tensor.tensor_type.name == "F32"


def test_rotary_pairs_become_neighbours():
    rows = torch.arange(12).view(12, 1)
    assert interleave_halves(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_llama3_frequencies_are_the_librarys():
    config = make_tiny("llama3_rope", head_dim=16).config
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.from_numpy(rope_factors(config)), scaled, rtol=1e-5)
    assert rope_factors(make_tiny("gqa").config) is None


@pytest.mark.parametrize("variant", [name for name in TINY_VARIANTS if name != "biases"])
def test_every_variant_is_exported(tmp_path, bpe, variant):
    _, folder = save(tmp_path, bpe, variant)
    assert export(folder).tensors


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": BYTES}], "gpt-2"),
        ([{"type": "Digits"}, {"type": BYTES}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}}, {"type": BYTES}], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": QWEN2}}, {"type": BYTES}], "qwen2"),
    ],
)
def test_splitting_rules_have_llama_cpps_names(tmp_path, steps, name):
    assert pre_tokenizer_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}, tmp_path) == name


def test_an_unknown_splitting_rule_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"llama\.cpp has no name for the tokenizer's splitting rule \['Whitespace'\]"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}}, tmp_path)


def test_sentencepiece_types():
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3}
    content = {"model": {"vocab": vocab, "byte_fallback": True, "unk_token": "<unk>"}}
    content["added_tokens"] = [{"id": 1, "content": "<s>", "special": True}]
    assert token_types(content, 5) == [2, 3, 6, 1, 5]


def test_what_llama_cpp_cannot_hold(tmp_path, bpe, tokenizer):
    _, folder = save(tmp_path, bpe)
    with pytest.raises(UserError, match=r"--outtype q8_0 packs 32 .* prune with --multiple_of 32"):
        export(folder, "--outtype", "q8_0")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another or pass --overwrite"):
        export(folder)
    export(folder, "--overwrite")
    (tmp_path / "model.gguf").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="a tokenizer of type WordLevel"):
        export(folder)
    assert not (tmp_path / "model.gguf").exists()
    make_tiny("qwen3").save_pretrained(folder)
    with pytest.raises(UserError, match="model type 'qwen3' is not exported; exported: llama, mistral"):
        export(folder)
