"""Training of pruned models: loss, gradients, checkpointing, adapters."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from models.families import FAMILIES, ROWS
from slim_utils.families import layer_shapes
from tests.library.subjects import BATCH, LENGTH, Subject, difference, every_row, logits, tokens
from train_utils.lora import lora_targets


def loss_of(model: PreTrainedModel) -> Tensor:
    """Loss of the tokens, always with the same dropout, which seed_oss has by default."""
    torch.manual_seed(0)
    return model(input_ids=tokens(), labels=tokens()).loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the loss, by parameter."""
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_row
def test_loss_is_the_cross_entropy_of_the_next_token(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    labels = tokens()
    labels[:, :4] = -100
    with torch.no_grad():
        output = model(input_ids=tokens(), labels=labels)
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert abs(float(output.loss - expected)) < 1e-5 * float(expected)


@every_row
def test_training_step_reaches_every_parameter(subject: Subject, tmp_path: Path) -> None:
    model = subject.load().train()
    with torch.no_grad():
        before = loss_of(model)
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        assert loss_of(model) < before


@every_row
def test_gradient_checkpointing_keeps_the_gradients(subject: Subject, tmp_path: Path) -> None:
    model = subject.load().train()
    expected = gradients(model)
    family = FAMILIES[subject.name]
    layers = family.decoder_layers(model)
    calls: list[int] = []
    for layer in layers:
        # Hooks of the layer itself run outside of what is computed again.
        layer.get_submodule(family.attention_out).register_forward_hook(lambda *_: calls.append(1))
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        calls.clear()
        found = gradients(model)
        # The forward, and again in the backward.
        assert len(calls) == 2 * len(layers)
        assert set(found) == set(expected)
        assert all(difference(expected[name], found[name]) < 1e-4 for name in expected)
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model)
    assert len(calls) == len(layers)


@every_row
def test_lora_is_merged_unmerged_and_reloaded(subject: Subject, tmp_path: Path) -> None:
    model = subject.load()
    plain = logits(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=lora_targets(model, None), init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    expected = logits(adapted)
    assert difference(plain, expected) > 1e-3
    adapted.save_pretrained(tmp_path)
    assert difference(expected, logits(PeftModel.from_pretrained(subject.load(), tmp_path))) < 1e-5
    adapted.merge_adapter()
    assert difference(expected, logits(adapted)) < 1e-4
    adapted.unmerge_adapter()
    assert difference(expected, logits(adapted)) < 1e-4
    with adapted.disable_adapter():
        assert difference(plain, logits(adapted)) < 1e-4
    restored = adapted.unload()
    for name, parameter in restored.named_parameters():
        assert difference(weights[name], parameter) < 1e-5, name
    assert difference(plain, logits(restored)) < 1e-4


@every_row
def test_lora_of_all_linear_modules_is_trained(subject: Subject, tmp_path: Path) -> None:
    model = subject.load().train()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


@pytest.mark.library
@pytest.mark.parametrize("name", [row.base_type for row in ROWS if row.expert_columns_key])
def test_routers_give_their_logits_and_loss(name):
    model = Subject(name).load()
    with torch.no_grad():
        output = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    experts = [shape.num_experts for shape in layer_shapes(model.config) if shape.num_experts]
    assert [tuple(scores.shape) for scores in output.router_logits] == [(BATCH * LENGTH, count) for count in experts]
    if name == "gemma4_text":
        # The stock class has no loss of its routers.
        assert not hasattr(output, "aux_loss")
        return
    assert output.aux_loss.isfinite() and output.aux_loss > 0


@pytest.mark.library
@pytest.mark.parametrize("name", [row.base_type for row in ROWS if row.expert_columns_key])
def test_experts_implementations_give_the_same_logits_and_gradients(name):
    model, eager = Subject(name).load(), Subject(name).load(experts_implementation="eager")
    expected, expected_gradients = logits(eager), gradients(eager)
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert difference(expected, logits(model)) < 1e-4
        found = gradients(model)
        assert all(difference(expected_gradients[key], found[key]) < 1e-3 for key in expected_gradients)
