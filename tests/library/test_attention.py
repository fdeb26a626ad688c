"""Inputs and outputs of the forward of pruned models: padding, positions, embeddings, attention implementations."""

from pathlib import Path

import torch
from torch import Tensor

from tests.library.subjects import BATCH, LENGTH, Subject, attention_shapes, difference, every_row, logits, tokens

PADDING = 5
# What follows from heads of 16 and a hidden size of 96: Mamba mixers are twice as wide; rotated dimensions of latents.
FURTHER_SIZES = {"granitemoehybrid": {"mamba_d_head": 48}, "deepseek_v3": {"qk_rope_head_dim": 16}}


def padded(ids: Tensor, left: bool) -> dict[str, Tensor]:
    """Inputs with ``PADDING`` more tokens on the left or the right."""
    padding = torch.zeros(len(ids), PADDING, dtype=torch.long)
    parts = [(padding, padding), (ids, torch.ones_like(ids))]
    both = [torch.cat(part, dim=1) for part in zip(*(parts if left else parts[::-1]), strict=True)]
    return {"ids": both[0], "attention_mask": both[1]}


def positions(mask: Tensor) -> Tensor:
    """Positions that count the tokens of a mask, as ``generate`` has them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@every_row
def test_left_padding_changes_no_logits(subject: Subject, tmp_path: Path) -> None:
    for implementation in ("eager", None):
        model = subject.load(attn_implementation=implementation)
        inputs = padded(tokens(), left=True)
        found = logits(model, **inputs, position_ids=positions(inputs["attention_mask"]))
        assert difference(logits(model), found[:, PADDING:]) < 1e-4


@every_row
def test_right_padding_changes_no_logits(subject: Subject, tmp_path: Path) -> None:
    for implementation in ("eager", None):
        model = subject.load(attn_implementation=implementation)
        found = logits(model, **padded(tokens(), left=False))
        assert difference(logits(model), found[:, :LENGTH]) < 1e-4


@every_row
def test_given_positions_and_mask_are_the_default(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    expected = logits(model)
    assert difference(expected, logits(model, attention_mask=mask)) < 1e-5
    given = torch.arange(LENGTH).expand(BATCH, -1)
    assert difference(expected, logits(model, position_ids=given)) < 1e-5
    assert difference(expected, logits(model, position_ids=given, attention_mask=mask)) < 1e-5
    # The layers read them.
    assert difference(expected, logits(model, position_ids=given.flip(1))) > 1e-4


@every_row
def test_embeddings_as_inputs_give_the_logits_of_their_tokens(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    embeddings = model.get_input_embeddings()(tokens()).detach()
    assert difference(logits(model), logits(model, inputs_embeds=embeddings)) < 1e-5
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    expected = model.generate(tokens(), attention_mask=mask, **options)[:, LENGTH:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **options), expected)


@every_row
def test_sdpa_gives_the_logits_of_eager_attention(subject: Subject, tmp_path: Path) -> None:
    model, eager = (subject.load(attn_implementation=name) for name in ("sdpa", "eager"))
    assert model.config._attn_implementation == "sdpa"
    for inputs in ({}, padded(tokens(), left=True), padded(tokens(), left=False)):
        mask = inputs.get("attention_mask", torch.ones(BATCH, LENGTH)).bool()
        expected = logits(eager, **inputs)[mask]
        assert difference(expected, logits(model, **inputs)[mask]) < 1e-4
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert model(tokens(), output_attentions=True).attentions[0] is not None
    assert difference(logits(eager), logits(model)) < 1e-6


@every_row
def test_hidden_states_and_attentions_have_the_shapes_of_the_layers(subject: Subject, tmp_path: Path) -> None:
    model = subject.load(attn_implementation="eager")
    with torch.no_grad():
        output = model(tokens(), output_hidden_states=True, output_attentions=True)
        model.config.output_hidden_states = model.config.output_attentions = True
        by_config = model(tokens())
        pair = model(tokens(), return_dict=False)
    num_states = model.config.num_hidden_layers + 1
    assert len(output.hidden_states) == num_states == len(by_config.hidden_states)
    assert {tuple(hidden.shape) for hidden in output.hidden_states} == {(BATCH, LENGTH, model.config.hidden_size)}
    expected = [(BATCH, shape.num_heads, LENGTH, LENGTH) for shape in attention_shapes(model.config)]
    for attentions in (output.attentions, by_config.attentions):
        assert [tuple(weights.shape) for weights in attentions] == expected
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    for weights in output.attentions:
        # Sinks take a part of it.
        assert (weights.sum(-1) < 1 + 1e-4).all() and (weights.sum(-1) > 0).all()
        assert not weights[..., future].any()
    assert torch.equal(pair[0], output.logits)
    # The last hidden state is what the head reads.
    assert difference(output.logits, logits(model, logits_to_keep=0)) < 1e-6


@every_row
def test_last_logits_alone_are_those_of_all(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    expected = logits(model)
    assert difference(expected[:, -2:], logits(model, logits_to_keep=2)) < 1e-5
    kept = torch.tensor([0, 5, 7])
    assert difference(expected[:, kept], logits(model, logits_to_keep=kept)) < 1e-5


@every_row
def test_half_precision_forward_is_finite(subject: Subject, tmp_path: Path) -> None:
    expected = logits(subject.load())
    for dtype in (torch.bfloat16, torch.float16):
        cast = subject.load().to(dtype)
        loaded = subject.load(dtype=dtype)
        for model in (cast, loaded):
            found = logits(model)
            assert found.dtype == dtype
            assert found.isfinite().all()
            # The eight bits of bfloat16, through four layers with large weights.
            assert (found.float() - expected).norm() < 0.3 * expected.norm()


@every_row
def test_flex_attention_gives_the_logits_of_eager_attention(subject: Subject, tmp_path: Path) -> None:
    """With heads of 16, the least that it takes, and without the compilation, which takes a minute per model."""
    sizes = {"head_dim": 16, "hidden_size": 96, **FURTHER_SIZES.get(subject.name, {})}
    model, eager = (subject.load(sizes, attn_implementation=kind) for kind in ("flex_attention", "eager"))
    assert model.config._attn_implementation == "flex_attention"
    for inputs in ({}, padded(tokens(), left=True)):
        mask = inputs.get("attention_mask", torch.ones(BATCH, LENGTH)).bool()
        with torch.compiler.set_stance("force_eager"):
            found = logits(model, **inputs)
        assert difference(logits(eager, **inputs)[mask], found[mask]) < 1e-4
