"""Modelfile of Ollama."""

from pathlib import Path

from slim_utils.export.ollama import modelfile, stop_texts
from tests.gguf_files import byte_level
from tests.tiny_models import make_tiny


def test_modelfile_stops_at_every_eos_token():
    model, tokenizer = make_tiny("gqa"), byte_level("gpt-2")
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("w"), 1]
    assert stop_texts(model, tokenizer) == ["</s>", "w"]
    text = modelfile(Path("folder/x.gguf"), ["</s>", 'a"b'])
    assert text == 'FROM ./x.gguf\nPARAMETER stop "</s>"\nPARAMETER stop """a"b"""\n'
