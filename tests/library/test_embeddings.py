"""Embeddings and heads of pruned models: tied, resized, replaced."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.library.subjects import Subject, difference, every_row, logits, tokens
from tests.tiny_models import VOCAB

TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@every_row
def test_tied_weights_stay_tied(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(TIED)
    assert is_tied(model)
    model.resize_token_embeddings(VOCAB + 6)
    assert is_tied(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert is_tied(other)
        assert difference(logits(model), logits(other)) < 1e-5
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB] = 1
    assert (model.get_output_embeddings().weight[VOCAB] == 1).all()


@every_row
def test_untied_weights_stay_apart(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(UNTIED)
    model.resize_token_embeddings(VOCAB + 6)
    model.save_pretrained(tmp_path)
    for other in (model, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert not is_tied(other)
        assert not torch.equal(other.get_output_embeddings().weight, other.get_input_embeddings().weight)
        assert difference(logits(model), logits(other)) < 1e-5


@every_row
def test_resized_embeddings_keep_tokens_and_reload(subject: Subject, tmp_path: Path) -> None:
    for size in (VOCAB + 9, VOCAB - 14):
        model = subject.load()
        kept = min(size, VOCAB)
        ids = tokens() % (kept - 3) + 3
        expected = logits(model, ids)
        embeddings = model.get_input_embeddings().weight.detach().clone()
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()
        assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
        assert torch.equal(model.get_input_embeddings().weight[:kept], embeddings[:kept])
        found = logits(model, ids)
        assert found.shape[-1] == size
        assert difference(expected[..., :kept], found[..., :kept]) < 1e-5
        model.save_pretrained(tmp_path / str(size))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(size))
        assert reloaded.config.vocab_size == size
        assert difference(found, logits(reloaded, ids)) < 1e-5
        model(input_ids=torch.full((1, 4), size - 1), labels=torch.full((1, 4), size - 1)).loss.backward()
        assert model.get_input_embeddings().weight.grad[size - 1].any()


@every_row
def test_padded_vocabulary_is_a_multiple(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    model.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=16, mean_resizing=False)
    assert model.config.vocab_size == VOCAB + 16
    assert logits(model).shape[-1] == VOCAB + 16


@every_row
def test_embeddings_can_be_replaced(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(UNTIED)
    hidden = model.config.hidden_size
    expected = logits(model)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.get_output_embeddings().weight.shape == (VOCAB, hidden)
    head = nn.Linear(hidden, VOCAB, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    embeddings = nn.Embedding(VOCAB, hidden)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    assert difference(expected, logits(model)) > 1e-2
    logits_of_zero = torch.zeros_like(head.weight)
    head.weight.data = logits_of_zero
    assert not logits(model).any()


@every_row
def test_number_of_parameters_is_that_of_the_layers(subject: Subject, tmp_path: Path) -> None:
    for tying in (TIED, UNTIED):
        model = subject.load(tying)
        parameters = list(model.parameters())
        assert model.num_parameters() == sum(parameter.numel() for parameter in parameters)
        # Every nn.Embedding, also of positions.
        embedded = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embedded
        parameters[-1].requires_grad_(False)
        trainable = sum(parameter.numel() for parameter in parameters[:-1])
        assert model.num_parameters(only_trainable=True) == trainable
        assert model.num_parameters() < subject.dense().load(tying).num_parameters()
