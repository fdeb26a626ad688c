"""Pruned models under torch.compile and torch.export."""

import pytest
import torch

from tests.library.subjects import Subject, difference, logits, tokens

# One of each kind of row: windows, norms over all heads, fused maps, maps that are resized, weights stored transposed,
# biases per head, experts. Seconds each.
KINDS = ["llama", "gemma3_text", "olmo2", "phi3", "opt", "stablelm", "gpt_neox", "gpt2", "bloom", "mixtral"]


@pytest.mark.library
@pytest.mark.parametrize("name", KINDS)
def test_compiled_model_gives_the_same_logits(name):
    model = Subject(name).load()
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(tokens()).logits
    assert difference(logits(model), found) < 1e-5


@pytest.mark.library
@pytest.mark.parametrize("name", KINDS)
def test_exported_program_gives_the_same_logits(name):
    model = Subject(name).load()
    program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False).module()
    ids = tokens(seed=2)
    assert difference(logits(model, ids), program(input_ids=ids, use_cache=False).logits) < 1e-5
