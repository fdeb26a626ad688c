"""Rules by which byte-level BPE tokenizers split a text into words, under llama.cpp's names."""

from tokenizers import Regex, pre_tokenizers

# Regular expressions of the pre-tokenizers, composed of their common parts.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UP_TO_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_FROM_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_SIGNS, _SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join((_CONTRACTIONS, _WORDS, _DIGITS, _SIGNS, _SPACES))
_QWEN2 = "|".join((_CONTRACTIONS, _WORDS, _DIGIT, _SIGNS, _SPACES))
_TEKKEN = "|".join((_UP_TO_LOWER, _FROM_UPPER, _DIGIT, _SIGNS_AND_SLASHES, _SPACES))
_O200K = "|".join(
    (f"{_UP_TO_LOWER}{_CONTRACTIONS}?", f"{_FROM_UPPER}{_CONTRACTIONS}?", _DIGITS, _SIGNS_AND_SLASHES, _SPACES)
)
# llama.cpp's names of the pre-tokenizers, by ``ignore_merges`` (whether a word that is a token is not split).
REGEX_NAMES = {
    _LLAMA3: {True: "llama-bpe", False: "smaug-bpe"},
    _QWEN2: {False: "qwen2"},
    _TEKKEN: {True: "tekken"},
    _O200K: {False: "gpt-4o"},
}
# llama.cpp's names of pre-tokenizers without a regular expression, by their steps before ByteLevel.
PLAIN_NAMES = {(): "gpt-2", ("Digits",): "smollm"}


def pre_tokenizer(name: str) -> tuple[pre_tokenizers.PreTokenizer, bool] | None:
    """Return the steps of the rule ``name``, and whether a word that is a token is not split; ``None`` if unknown."""
    for steps, known in PLAIN_NAMES.items():
        if name == known:
            digits = [pre_tokenizers.Digits(individual_digits=True)] if steps else []
            return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]), False
    for regex, names in REGEX_NAMES.items():
        for ignore_merges, known in names.items():
            if name == known:
                split = pre_tokenizers.Split(Regex(regex), "isolated")
                bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
                return pre_tokenizers.Sequence([split, bytes_alone]), ignore_merges
    return None
