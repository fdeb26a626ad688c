"""Tokenizers in GGUF files: pre-tokenizers, token types, spaces, and tokenizers that llama.cpp cannot reproduce."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slim_utils.common.errors import UserError
from slim_utils.export.gguf_tokenizer import (
    merge_scores,
    pre_tokenizer_name,
    read_vocabulary,
    space_prefix,
    token_types,
)
from tests.gguf_files import (
    BYTE_LEVEL,
    LLAMA3,
    QWEN2,
    SENTENCEPIECE,
    TEKKEN,
    byte_level,
    export,
    sentencepiece_folder,
    sentencepiece_llama,
    values,
)
from tests.tiny_models import make_tiny

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER_SPLIT = BYTES | {"use_regex": False}


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def rule(*steps, **content):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "ignore_merges": False}
    content["model"] = model | content.pop("model", {})
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "normalizer": None, **content}


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    """``tokenizer`` with ``change`` applied to the content of its file."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_read_vocabulary_names_known_pre_tokenizers(name):
    assert read_vocabulary(byte_level(name), 600, "here").pre_tokenizer == name


def test_pre_tokenizer_name_of_removed_matches_is_that_of_isolated_ones():
    assert pre_tokenizer_name(rule(split(QWEN2, "Removed", True), AFTER_SPLIT), "here") == "qwen2"


def test_pre_tokenizer_name_of_ignore_merges_without_effect_ignores_it():
    whole = {"ignore_merges": True}
    assert pre_tokenizer_name(rule(split(QWEN2), AFTER_SPLIT, model=whole), "here") == "qwen2"
    assert pre_tokenizer_name(rule(split(TEKKEN), AFTER_SPLIT), "here") == "tekken"
    # Merging "a", "b", "b" does not give the token "abb".
    unreached = {"vocab": {"a": 0, "b": 1, "ab": 2, "bb": 3, "abb": 4}, "merges": [["a", "b"], ["b", "b"], ["a", "bb"]]}
    with pytest.raises(UserError, match=r"llama\.cpp does not support"):
        pre_tokenizer_name(rule(split(QWEN2), AFTER_SPLIT, model=unreached | whole), "here")


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Whitespace"}],
        [BYTES | {"add_prefix_space": True}],
        [AFTER_SPLIT],
        [{"type": "Digits", "individual_digits": False}, BYTES],
        [split(LLAMA3), BYTES],
        [split(LLAMA3, "Removed"), AFTER_SPLIT],
        [split(LLAMA3 + "|x"), AFTER_SPLIT],
        [split(QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "")), AFTER_SPLIT],
        [split(LLAMA3), split(QWEN2), AFTER_SPLIT],
        [{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, AFTER_SPLIT],
        [],
    ],
)
def test_pre_tokenizer_name_of_an_unknown_rule_is_refused(steps):
    with pytest.raises(
        UserError, match=r"here: llama\.cpp does not support the tokenizer's pre-tokenizer \[.*\]"
    ) as error:
        pre_tokenizer_name(rule(*steps), "here")
    assert "\n" not in str(error.value)


def test_pre_tokenizer_name_of_a_normalizer_warns_or_is_refused(caplog):
    assert pre_tokenizer_name(rule(BYTES, normalizer={"type": "NFC"}), "here") == "gpt-2"
    assert "does not normalise text to NFC" in caplog.text
    with pytest.raises(
        UserError, match=r"here: llama\.cpp does not support the tokenizer's normalizer \['Lowercase'\]"
    ):
        pre_tokenizer_name(rule(BYTES, normalizer={"type": "Lowercase"}), "here")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_export_of_sentencepiece_has_its_space_prefix_and_unknown_token(tmp_path, kind):
    tokenizer = sentencepiece_llama(tmp_path / "base", kind)
    make_tiny("gqa", vocab_size=410).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    keys = values(export(tmp_path / "model"))
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    scores = keys["tokenizer.ggml.scores"]
    assert min(scores) == scores[keys["tokenizer.ggml.tokens"].index(_last_merge(tokenizer))] < -50


def _last_merge(tokenizer):
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    # The score of a token is that of its first merge.
    return list(dict.fromkeys("".join(merge) for merge in merges))[-1]


def test_export_of_a_folder_without_tokenizer_json_works(tmp_path):
    make_tiny("gqa", vocab_size=400).save_pretrained(tmp_path / "model")
    sentencepiece_folder(tmp_path / "model")
    assert values(export(tmp_path / "model"))["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("always", True), ("never", False)])
def test_space_prefix_of_metaspace_follows_its_scheme(scheme, prefix):
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    assert space_prefix(rule(metaspace), "here") is prefix
    assert space_prefix({**rule(), "pre_tokenizer": metaspace}, "here") is prefix


def test_space_prefix_of_gemma_is_none():
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    assert space_prefix(rule(spaces, normalizer=replace), "here") is False
    letters = spaces | {"pattern": {"String": "e"}}
    with pytest.raises(UserError, match="the tokenizer's steps"):
        space_prefix(rule(letters, normalizer=replace), "here")


def test_space_prefix_of_other_steps_is_refused():
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    assert space_prefix(rule(metaspace), "here") is True
    for content in (
        rule(metaspace, model={"vocab": {"▁▁": 0}}),
        rule(metaspace | {"replacement": "_"}),
        rule(metaspace, normalizer={"type": "NFKC"}),
        rule(metaspace, {"type": "Digits", "individual_digits": True}),
        rule(normalizer={"type": "Prepend", "prepend": "▁"}),
    ):
        with pytest.raises(UserError, match=r"here: llama\.cpp's SentencePiece does not support the tokenizer's steps"):
            space_prefix(content, "here")


def test_merge_scores_of_unmerged_pairs_is_refused():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    assert merge_scores({"model": {"vocab": vocab, "merges": merges}}, 7, "here") == [0, 0, 0, -1, -3, -2, 0]
    with pytest.raises(UserError, match="here: the tokenizer does not merge 'a' and 'bc' into 'abc'"):
        merge_scores({"model": {"vocab": vocab, "merges": merges[:-1]}}, 7, "here")


def test_token_types_of_sentencepiece_have_byte_and_unknown():
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3}
    content = {"model": {"vocab": vocab, "byte_fallback": True}}
    content["added_tokens"] = [{"id": vocab[text], "content": text, "special": True} for text in ("<unk>", "<s>")]
    assert token_types(content, 5, "<unk>") == [2, 3, 6, 1, 5]
    assert token_types(content, 5, None) == [3, 3, 6, 1, 5]


def test_read_vocabulary_of_an_unknown_token_that_is_eos_keeps_it_control():
    def name_unknown(content):
        content["model"]["unk_token"] = "</s>"

    assert read_vocabulary(changed(byte_level("gpt-2"), name_unknown), 600, "here").types[:3] == [3, 3, 1]


def test_read_vocabulary_of_tokens_that_strip_spaces_warns(caplog):
    tokenizer = byte_level("gpt-2")
    read_vocabulary(tokenizer, 610, "here")
    assert not caplog.text
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True)])
    read_vocabulary(tokenizer, 610, "here")
    assert "llama.cpp keeps the spaces beside the tokens '<end>', which this tokenizer strips" in caplog.text


def test_read_vocabulary_with_dropout_is_refused():
    def drop(content):
        content["model"]["dropout"] = 0.5

    with pytest.raises(UserError, match=r"here: the tokenizer uses dropout, which llama\.cpp does not support"):
        read_vocabulary(changed(byte_level("gpt-2"), drop), 600, "here")


@pytest.mark.parametrize(
    ("missing", "beyond"), [(1, r"1 .* \('<tool>'\)"), (4, r"4 .* \('.*', '.*', '\[PAD\]', '<tool>'\)")]
)
def test_export_with_tokens_beyond_the_embedding_is_refused(tmp_path, missing, beyond):
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens(["[PAD]", "<tool>"])
    rows = len(tokenizer) - missing
    make_tiny("gqa", vocab_size=rows).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=rf": {beyond} have no row in the embedding of {rows};"):
        export(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_read_vocabulary_of_a_reloaded_sentencepiece_tokenizer_is_the_same(tmp_path):
    first = sentencepiece_llama(tmp_path / "base", "metaspace")
    first.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert read_vocabulary(again, 400, "here") == read_vocabulary(first, 400, "here")
