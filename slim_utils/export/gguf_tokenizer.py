"""Export of a Hugging Face tokenizer to the GGUF keys of llama.cpp."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from slim_utils.common.bos import adds_bos
from slim_utils.common.bpe_rules import PLAIN_NAMES, REGEX_NAMES
from slim_utils.common.errors import UserError

logger = logging.getLogger(__name__)

_SPACE = "▁"
_BYTE_TOKEN_PREFIX = "<0x"


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary in llama.cpp's format.

    Attributes:
        tokens: text of every id.
        types: ``TokenType`` of every id.
        merges: pairs joined by a space, in order of priority; empty for SentencePiece.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        scores: score of every id, for SentencePiece, which merges into the token with the highest score first.
        space_prefix: whether a space is put before a text, for SentencePiece.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str = "default"
    scores: list[float] | None = None
    space_prefix: bool = False


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> Vocabulary:
    """Vocabulary of the loaded ``tokenizer``.

    Args:
        tokenizer: tokenizer of the model.
        vocab_size: rows of the embedding; ids that the tokenizer does not have become unused tokens.
        source: name of the tokenizer in error messages.

    Raises:
        UserError: for a tokenizer that llama.cpp cannot reproduce.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{source}: {type(tokenizer).__name__} has no tokenizer.json to export")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{source}: tokenizers of type {model.get('type')} cannot be exported; supported: BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise UserError(f"{source}: the tokenizer uses {setting}, which llama.cpp does not support")
    _check_rows(content, vocab_size, source)
    _warn_about_strips(content)
    tokens = token_list(content, vocab_size)
    if model.get("byte_fallback"):
        types = token_types(content, vocab_size, _unknown(model.get("unk_token") or tokenizer.unk_token, tokenizer))
        prefix, scores = space_prefix(content, source), merge_scores(content, vocab_size, source)
        return Vocabulary(tokens, types, [], scores=scores, space_prefix=prefix)
    types = token_types(content, vocab_size, _unknown(model.get("unk_token"), tokenizer))
    name = pre_tokenizer_name(content, source)
    return Vocabulary(tokens, types, [" ".join(pair) for pair in _merges(model)], name)


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write tokens, merges or scores, special tokens and chat template."""
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    _write_special(writer, tokenizer)


def pre_tokenizer_name(content: dict[str, Any], source: str) -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer.

    Args:
        content: content of ``tokenizer.json``.
        source: name of the tokenizer in error messages.

    Raises:
        UserError: for an unsupported normalizer or pre-tokenizer.
    """
    normalizers = [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if normalizers == ["NFC"]:
        logger.warning("llama.cpp does not normalise text to NFC, unlike this tokenizer")
    elif normalizers:
        raise UserError(f"{source}: llama.cpp does not support the tokenizer's normalizer {normalizers}")
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    name = _name_of_steps(steps, content)
    if name is None:
        kinds = [step["type"] for step in steps]
        patterns = "".join(f", {step['pattern']}" for step in steps if "pattern" in step)
        raise UserError(f"{source}: llama.cpp does not support the tokenizer's pre-tokenizer {kinds}{patterns}")
    return name


def space_prefix(content: dict[str, Any], source: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text, with a normalizer or a pre-tokenizer.

    Args:
        content: content of ``tokenizer.json``.
        source: name of the tokenizer in error messages.

    Raises:
        UserError: for unsupported normalizers or pre-tokenizers.
    """
    normalizers = _steps(content.get("normalizer"), "normalizers")
    splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if replace in normalizers:
        # Gemma also splits at spaces, of which the replacement leaves none.
        splits = [step for step in splits if step["type"] != "Split" or step["pattern"] != {"String": " "}]
    if not splits and normalizers in ([prepend, replace], [replace]):
        return normalizers[0] == prepend
    if not normalizers and [step["type"] for step in splits] == ["Metaspace"]:
        (step,) = splits
        inner = any(_SPACE in token[1:] for token in content["model"]["vocab"])
        if step["replacement"] == _SPACE and not (step["split"] and inner):
            scheme = step["prepend_scheme"]
            if scheme != "never":
                # This is the behaviour of SentencePiece; GGUF has no key to change it.
                also = " and after every special token" if scheme == "first" else ""
                logger.info("llama.cpp, unlike this tokenizer, puts a space before a text that starts with one%s", also)
            return scheme != "never"
    kinds = [step["type"] for step in normalizers + splits]
    raise UserError(f"{source}: llama.cpp's SentencePiece does not support the tokenizer's steps {kinds}")


def merge_scores(content: dict[str, Any], vocab_size: int, source: str) -> list[float]:
    """Score of every id; earlier merges have higher scores.

    Args:
        content: content of ``tokenizer.json``.
        vocab_size: number of scores.
        source: name of the tokenizer in error messages.

    Raises:
        UserError: if two adjacent tokens form a third without a merge rule; llama.cpp would merge them.
    """
    vocab, merges = content["model"]["vocab"], _merges(content["model"])
    scores = [0.0] * vocab_size
    for rank, pair in enumerate(merges):
        index = vocab.get("".join(pair))
        if index is not None and scores[index] == 0.0:
            scores[index] = -float(rank + 1)
    merge_set, added = set(merges), {token["content"] for token in content.get("added_tokens", [])}
    for token in vocab.keys() - added:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in merge_set and all(part in vocab and part not in added for part in pair):
                raise UserError(
                    f"{source}: the tokenizer does not merge {pair[0]!r} and {pair[1]!r} into {token!r}, as "
                    "llama.cpp's SentencePiece would"
                )
    return scores


def token_list(content: dict[str, Any], vocab_size: int) -> list[str]:
    """Text of every id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    for text, index in _ids(content).items():
        tokens[index] = text
    return tokens


def token_types(content: dict[str, Any], vocab_size: int, unknown: str | None) -> list[int]:
    """``TokenType`` of every id: normal, control (special), user-defined, byte, unused, or unknown."""
    types = [int(TokenType.UNUSED)] * vocab_size
    fallback = content["model"].get("byte_fallback")
    for text, index in content["model"]["vocab"].items():
        is_byte = fallback and text.startswith(_BYTE_TOKEN_PREFIX)
        types[index] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in content.get("added_tokens", []):
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    ids = _ids(content)
    if unknown in ids:
        types[ids[unknown]] = int(TokenType.UNKNOWN)
    return types


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """Id of every token, added tokens last."""
    return content["model"]["vocab"] | {added["content"]: added["id"] for added in content.get("added_tokens", [])}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _steps(rule: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer: none, one, or a sequence under ``key``."""
    return [] if rule is None else rule.get(key, [rule])


def _unknown(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The unknown token ``name``; ``None`` if it is also the BOS or EOS token."""
    return None if name in (tokenizer.bos_token, tokenizer.eos_token) else name


def _check_rows(content: dict[str, Any], vocab_size: int, source: str) -> None:
    beyond = [text for text, index in sorted(_ids(content).items(), key=lambda item: item[1]) if index >= vocab_size]
    if beyond:
        shown = ", ".join(map(repr, beyond[:5])) + (", …" if len(beyond) > 5 else "")
        raise UserError(
            f"{source}: {len(beyond)} of the tokenizer's tokens ({shown}) have no row in the embedding of "
            f"{vocab_size}; remove them from the tokenizer, or resize the embeddings of the model"
        )


def _warn_about_strips(content: dict[str, Any]) -> None:
    added = content.get("added_tokens", [])
    strips = [repr(token["content"]) for token in added if token["lstrip"] or token["rstrip"]]
    if strips:
        shown = ", ".join(strips[:5]) + (", …" if len(strips) > 5 else "")
        logger.warning("llama.cpp keeps the spaces beside the tokens %s, which this tokenizer strips", shown)


def _name_of_steps(steps: list[dict[str, Any]], content: dict[str, Any]) -> str | None:
    *firsts, last = steps or [{"type": ""}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if any(not step.get("individual_digits") for step in firsts):
            return None
        return _fitting({False: PLAIN_NAMES.get(tuple(step["type"] for step in firsts))}, content)
    if len(firsts) != 1 or firsts[0]["type"] != "Split":
        return None
    (split,) = firsts
    # Both mean that each match is a word; the known expressions leave no text between matches.
    if (split["behavior"], split["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    return _fitting(REGEX_NAMES.get(split["pattern"].get("Regex"), {}), content)


def _fitting(names: Mapping[bool, str | None], content: dict[str, Any]) -> str | None:
    """The name for the tokenizer's ``ignore_merges``, or the other name if the setting makes no difference."""
    ignored = bool(content["model"].get("ignore_merges"))
    name, other = names.get(ignored), names.get(not ignored)
    return other if name is None and other is not None and _merges_make_every_token(content) else name


def _merges_make_every_token(content: dict[str, Any]) -> bool:
    """Whether merging the text of each token, except added tokens, gives that token."""
    vocab = content["model"]["vocab"]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=_merges(content["model"])))
    texts = list(vocab.keys() - {added["content"] for added in content.get("added_tokens", [])})
    encodings = bpe.encode_batch(texts)
    return all(encoding.ids == [vocab[text]] for text, encoding in zip(texts, encodings, strict=True))


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    # gguf.SpecialVocab is not used: it guesses the added tokens from the files of a folder, not the loaded tokenizer.
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
