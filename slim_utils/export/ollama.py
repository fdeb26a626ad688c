"""Modelfile with which Ollama runs a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def modelfile_path(gguf: Path) -> Path:
    """Path of the Modelfile beside the file ``gguf``."""
    return gguf.with_name(f"{gguf.name}.Modelfile")


def modelfile(gguf: Path, stop_texts: list[str]) -> str:
    """Text of the Modelfile of ``gguf``, which lies in the same folder.

    There is no TEMPLATE: Ollama's are Go templates, and it matches the chat template inside the file with its own.

    Args:
        gguf: GGUF file.
        stop_texts: texts that end a generation.
    """
    lines = [f"FROM ./{gguf.name}"]
    for text in stop_texts:
        quote = '"""' if '"' in text or "\n" in text else '"'
        lines.append(f"PARAMETER stop {quote}{text}{quote}")
    return "\n".join(lines) + "\n"


def stop_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that end a generation: the tokenizer's EOS and those of the generation configuration."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    texts = [tokenizer.convert_ids_to_tokens(token_id) for token_id in dict.fromkeys(ids) if token_id is not None]
    return [text for text in texts if text]
