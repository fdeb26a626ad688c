"""Tiny tokenizers of every kind that llama.cpp knows, and what exports a tiny model with one of them."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from scripts import export_gguf as script
from slim_utils.families import find_family, layer_shapes
from slim_utils.masks import LayerMask
from slim_utils.params_remove import shrink
from tests.conftest import random_text
from tests.tiny_models import make_tiny

# Splitting rules as published tokenizers spell them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By llama.cpp's name: the regular expression, if the rule needs one, and whether words that are tokens stay whole.
BYTE_LEVEL = {
    "gpt-2": (None, False),
    "smollm": (None, False),
    "llama-bpe": (LLAMA3, True),
    "smaug-bpe": (LLAMA3, False),
    "qwen2": (QWEN2, False),
    "tekken": (TEKKEN, True),
    "gpt-4o": (O200K, False),
}
SENTENCEPIECE = ("metaspace", "prepend")
# Where the rules differ: numbers, contractions, capitals, slashes, runs of spaces and lines, letters beyond ASCII.
TEXTS = [
    "The Market garden isn't open in 12345 days.",
    "NewYork HTTPServer we'LL go/\n\n  river   stone\r\n\tend  ",
    "Überall stehen große Häuser; 東京 и Москва 2024!?",
    "xylophone x",
]
# Where tokenizers differ most often: spaces at the ends, line ends, digits, composed letters, emoji, special tokens.
AWKWARD = [
    " ",
    "  two spaces before",
    "two after  ",
    "tab\tand\t\ttabs",
    "line\r\nends\r\n\r\nof Windows",
    "\n\n\nlines before",
    "0 12 345 6789 1,234.56 ²½",
    "naïve Ünïcödé e\u0301 ﬁ ﷺ",
    "日本語とEnglish, 한국어",
    "👩‍👩‍👧 🙂🙂 ™",
    "a</s>b <s> c</s>",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x = [1,2];  // ok\n\tif (a != b) {}",
    "DON'T we'll I'M 'tis",
]
CORPUS = "\n".join((*TEXTS[:3], random_text(20), "don't DON'T Garden GARDEN newYork 99 1000 // ")) * 3
# Has no merges.
WHOLE = "xylophone"


def byte_level(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 600 tokens with the splitting rule that llama.cpp calls ``name``.

    It has learnt whatever stands between spaces, and one token is that of no merge: another rule gives other tokens.
    """
    inner = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learnt = pre_tokenizers.Split(Regex(r" ?\S+|\s+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([learnt, bytes_alone])
    trainer = trainers.BpeTrainer(
        vocab_size=599,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([CORPUS], trainer)
    model = json.loads(inner.to_str())["model"]
    regex, ignore_merges = BYTE_LEVEL[name]
    vocab, merges = model["vocab"] | {WHOLE: len(model["vocab"])}, list(map(tuple, model["merges"]))
    inner.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)]
    if regex is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(regex), "isolated"))
    elif name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def sentencepiece_folder(folder: Path, legacy: bool = False) -> Path:
    """A folder with a SentencePiece model of at most 400 tokens as LLaMA 2 has it, and no ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    # The library asks the configuration for the tokenizer's class.
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def sentencepiece_llama(folder: Path, kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of such a folder; its leading space comes from a pre-tokenizer or, as published, a normalizer."""
    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_folder(folder))
    if kind == "metaspace":
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    content["model"]["unk_token"] = "<unk>"
    inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_pruned(
    folder: Path, tokenizer: PreTrainedTokenizerFast, variant: str, uniform: bool, **overrides: Any
) -> PreTrainedModel:
    """A tiny model of ``variant`` in ``folder`` with the tokenizer, its layers pruned alike or each otherwise."""
    model = make_tiny(variant, **overrides)
    masks = []
    for index, shape in enumerate(layer_shapes(model.config)):
        gone = 0 if uniform else index
        groups = [group for group in range(shape.num_kv_heads) if group != gone % shape.num_kv_heads]
        masks.append(LayerMask.from_groups(shape, groups, list(range(4 * gone, shape.num_columns))))
    small = shrink(model, find_family(model.config), masks, uniform)
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return small


def export(folder: Path, *flags: str) -> GGUFReader:
    """Run the script in this process and read what it wrote beside ``folder``."""
    out = folder.with_name("model.gguf")
    script.main(script.build_parser().parse_args([str(folder), str(out), *flags]))
    assert not list(out.parent.glob(".*"))
    return GGUFReader(out)


def values(reader: GGUFReader) -> dict[str, object]:
    """The keys of a file."""
    return {name: field.contents() for name, field in reader.fields.items()}
