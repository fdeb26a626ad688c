"""Generation of pruned models: caches, beams, sampling, chunks, assistants."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from slim_utils.families import layer_shapes
from tests.library.subjects import BATCH, LENGTH, Subject, attention_shapes, difference, every_row, logits, tokens

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def generate(model: PreTrainedModel, ids: Tensor | None = None, **options: Any) -> Tensor:
    """New tokens, greedy unless ``options`` say otherwise."""
    ids = tokens() if ids is None else ids
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{**GREEDY, **options})[:, ids.shape[1] :]


@every_row
def test_caches_of_every_kind_generate_as_none(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    expected = generate(model, use_cache=False)
    # The offloaded ones need a stream of a GPU, quantised ones a package for it.
    for kind in ("dynamic", "static"):
        assert torch.equal(generate(model, cache_implementation=kind), expected), kind


@every_row
def test_caches_have_the_kv_heads_of_the_layers(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    expected = logits(model)
    shapes = layer_shapes(model.config)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 4)):
        first = logits(model, tokens()[:, :7], past_key_values=cache)
        second = logits(model, tokens()[:, 7:], past_key_values=cache)
        assert difference(expected, torch.cat([first, second], dim=1)) < 1e-4
        found = [layer.keys.shape[1] for layer, shape in zip(cache.layers, shapes, strict=True) if shape.num_heads]
        # Latents are those of all heads.
        assert found == [1 if shape.latent_dim else shape.num_kv_heads for shape in shapes if shape.num_heads]


@every_row
def test_prompt_in_chunks_generates_as_in_one(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    expected = generate(model)
    for kind in ("dynamic", "static"):
        found = generate(model, prefill_chunk_size=5, cache_implementation=kind)
        assert torch.equal(found, expected), kind


@every_row
def test_padded_batch_generates_as_its_prompts_alone(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    ids = tokens()
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    alone = [generate(model, ids[row : row + 1, padding:]) for row, padding in enumerate((0, 3, 6))]
    assert torch.equal(generate(model, ids, attention_mask=mask), torch.cat(alone))


@every_row
def test_beams_and_samples_with_a_cache_are_those_without(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(generate(model, use_cache=use_cache, **options))
        assert found[0].shape == (BATCH * options.get("num_return_sequences", 1), NEW)
        assert torch.equal(*found)


@every_row
def test_generate_returns_scores_and_states_of_every_layer(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(attn_implementation="eager")
    asked = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    options = {**GREEDY, **dict.fromkeys(asked, True)}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    output = model.generate(tokens(), attention_mask=mask, return_dict_in_generate=True, **options)
    full = logits(model, output.sequences)[:, LENGTH - 1 : -1]
    assert difference(full, torch.stack(output.logits, dim=1)) < 1e-4
    for step in output.attentions:
        assert [weights.shape[1] for weights in step] == [shape.num_heads for shape in attention_shapes(model.config)]
    assert len(output.hidden_states) == NEW


@every_row
def test_pruned_model_assists_the_dense_one(subject: Subject, tmp_path: Path) -> None:
    dense, pruned = subject.dense().load(), subject.load()
    prompt = tokens(1)
    expected = generate(dense, prompt)
    assert torch.equal(generate(dense, prompt, assistant_model=pruned), expected)
    assert torch.equal(generate(dense, prompt, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(generate(pruned, prompt, assistant_model=dense), generate(pruned, prompt))
