"""A Hugging Face tokenizer as the keys that llama.cpp reads."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from slim_utils.errors import UserError

# Regular expressions that llama.cpp knows by name, by a part of them that no other has.
_SPLITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"|\p{N}|"}
_BYTE_TOKEN_PREFIX = "<0x"


def write_vocabulary(writer: GGUFWriter, folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and chat template.

    Args:
        writer: of the file.
        folder: of the checkpoint, with its ``tokenizer.json``.
        tokenizer: loaded from there.
        vocab_size: rows of the embedding; ids beyond the tokenizer's are written as unused.

    Raises:
        UserError: for a tokenizer that is not a byte-pair encoding llama.cpp knows.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no tokenizer.json to export") from None
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{folder}: a tokenizer of type {model.get('type')}; llama.cpp's export takes BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, content, merges, vocab_size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(content, folder))
        writer.add_token_list(token_list(content, vocab_size))
        writer.add_token_types(token_types(content, vocab_size))
        writer.add_token_merges(merges)
    _write_special(writer, tokenizer)


def pre_tokenizer_name(content: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the rule that splits text before merging.

    Raises:
        UserError: for a rule it has no name for.
    """
    rule = content.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        for name, part in _SPLITS.items():
            if part in pattern:
                return name
    raise UserError(f"{folder}: llama.cpp has no name for the tokenizer's splitting rule {kinds}")


def token_list(content: dict[str, Any], vocab_size: int) -> list[str]:
    """Text of every id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    for text, index in content["model"]["vocab"].items():
        tokens[index] = text
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
    return tokens


def token_types(content: dict[str, Any], vocab_size: int) -> list[int]:
    """Kind of every id: ordinary, control (special), added by the user, byte, or unused."""
    types = [int(TokenType.UNUSED)] * vocab_size
    fallback = content["model"].get("byte_fallback")
    for text, index in content["model"]["vocab"].items():
        is_byte = fallback and text.startswith(_BYTE_TOKEN_PREFIX)
        types[index] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in content.get("added_tokens", []):
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = content["model"].get("unk_token")
    if unknown is not None:
        types[content["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return types


def _write_sentencepiece(writer: GGUFWriter, content: dict[str, Any], merges: list[str], vocab_size: int) -> None:
    """A BPE with byte fallback: llama.cpp merges by score, so an earlier merge gets a higher one."""
    scores = [0.0] * vocab_size
    for rank, merge in enumerate(merges):
        index = content["model"]["vocab"].get(merge.replace(" ", ""))
        if index is not None and scores[index] == 0.0:
            scores[index] = -float(rank + 1)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(token_list(content, vocab_size))
    writer.add_token_scores(scores)
    writer.add_token_types(token_types(content, vocab_size))
    writer.add_add_space_prefix("Prepend" in json.dumps(content.get("normalizer")))


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
