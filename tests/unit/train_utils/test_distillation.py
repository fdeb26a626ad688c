"""KL divergence from a teacher against its formula in fp64, for any chunk size, and with gradient accumulation."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from tests.tiny_models import ALL_TINY, VOCAB, make_tiny
from train_utils import distillation
from train_utils.distillation import ChunkedDivergence, DistillationTrainer, Head, LiveTeacher, target_rows
from train_utils.finetune_args import TrainingArguments
from train_utils.finetune_dataset import IGNORED_LABEL


def brute_force(student, teacher) -> torch.Tensor:
    """KL(teacher ‖ student) summed over tokens, in fp64, by its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for student_row, teacher_row in zip(student.double(), teacher.double(), strict=True):
        q, p = (row.exp() / row.exp().sum() for row in (student_row, teacher_row))
        total = total + (p * (p.log() - q.log())).sum()
    return total


def pair(variant: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and another model as its teacher."""
    student, teacher = make_tiny(variant, dtype), make_tiny(variant, dtype)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return student, teacher


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    # Some are zero but for rounding.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def as_batch(samples) -> dict[str, torch.Tensor]:
    """A batch without padding in which every token is a target."""
    return {"input_ids": samples, "attention_mask": torch.ones_like(samples), "labels": samples}


def chunked(student, teacher, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Divergence over all targets and its gradients, chunk by chunk."""
    head = Head(student)
    student(input_ids=samples, logits_to_keep=1)
    hidden = target_rows(head.take_hidden(), samples)
    divergence = LiveTeacher(teacher).targets(as_batch(samples))
    loss = ChunkedDivergence.apply(head, divergence, hidden, *head.parameters())
    # A factor, as the Trainer's scaling of the loss is one.
    (3 * loss).backward()
    return loss.detach(), {name: gradient / 3 for name, gradient in gradients_of(student).items()}


def by_formula(student, teacher, samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same from whole logits."""
    with torch.no_grad():
        expected = teacher(input_ids=samples).logits[:, :-1].flatten(0, 1)
    loss = brute_force(student(input_ids=samples).logits[:, :-1].flatten(0, 1), expected)
    loss.backward()
    return loss.detach(), gradients_of(student)


@pytest.mark.parametrize("chunk", [1, 3, 32, 256])
def test_chunked_divergence_value_and_gradients_match_the_formula(monkeypatch, samples, chunk):
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", chunk)
    value, gradients = chunked(*pair("tied"), samples)
    expected, plain = by_formula(*pair("tied"), samples)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients, plain)


@pytest.mark.parametrize("variant", [*ALL_TINY, "gemma4_text of inputs by layer", "llama4_text"])
def test_chunked_divergence_of_every_family_matches_the_formula(samples, variant):
    value, gradients = chunked(*pair(variant), samples)
    expected, plain = by_formula(*pair(variant), samples)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(gradients, plain)


def test_chunked_divergence_from_itself_is_zero(samples):
    model = make_tiny("gqa")
    value, gradients = chunked(model, model, samples)
    assert abs(value.item()) < 1e-5
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-4


def test_chunked_divergence_in_bf16_is_computed_in_fp32(samples):
    value, _ = chunked(*pair("gqa", torch.bfloat16), samples)
    expected, _ = by_formula(*pair("gqa", torch.bfloat16), samples)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-2)


def test_head_of_a_model_with_adapters_has_its_logits(samples):
    config = LoraConfig(r=2, target_modules=["o_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(make_tiny("gqa"), config).eval()
    head = Head(model)
    with torch.no_grad():
        expected = model(input_ids=samples).logits
        hidden = head.take_hidden()
        assert torch.equal(head(hidden[1]), expected[1])
        # The decoder runs again afterwards.
        assert torch.equal(model(input_ids=samples).logits, expected)
    assert len(head.parameters()) == 2


def test_target_rows_skips_ignored_labels():
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[1, IGNORED_LABEL, 2, IGNORED_LABEL], [IGNORED_LABEL, 0, IGNORED_LABEL, IGNORED_LABEL]])
    # Position t predicts token t + 1: the third token in the first row, the second token in the second row.
    assert torch.equal(target_rows(logits, labels), torch.stack([logits[0, 1], logits[1, 0]]))


def rows(count: int) -> Dataset:
    """Samples of different lengths, each with a masked prompt."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (6 + index,), generator=generator).tolist()
        masked = 2 + index % 3
        labels = [IGNORED_LABEL] * masked + ids[masked:]
        samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(samples)


def batches(tokenizer) -> DataCollatorForSeq2Seq:
    """Collator that pads on the right."""
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = "<unk>"
    return DataCollatorForSeq2Seq(padding, padding=True)


def train_step(tmp_path, tokenizer, **flags) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weights of one step on eight samples."""
    student, teacher = make_tiny("gqa"), make_tiny("mha")
    flags |= {"max_steps": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    args = TrainingArguments(output_dir=str(tmp_path), lr_scheduler_type="constant", save_strategy="no", **flags)
    options = {"model": student, "args": args, "train_dataset": rows(8), "data_collator": batches(tokenizer)}
    trainer = DistillationTrainer(teacher=LiveTeacher(teacher), **options)
    trainer.train()
    return trainer.state.log_history[0]["loss"], student.state_dict()


def test_distillation_loss_of_accumulated_batches_equals_a_large_batch(tmp_path, tokenizer):
    loss, weights = train_step(tmp_path, tokenizer, per_device_train_batch_size=8)
    split_loss, split = train_step(tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(split[name], weights[name], atol=1e-5) for name in weights)
    start = make_tiny("gqa").state_dict()
    assert any((weights[name] - start[name]).abs().max() > 1e-3 for name in weights)


def test_distillation_loss_of_a_step_is_the_mean_over_its_targets(tmp_path, tokenizer):
    student, teacher, terms, count = make_tiny("gqa"), make_tiny("mha"), 0.0, 0
    for sample in rows(8):
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        with torch.no_grad():
            student_logits, teacher_logits = student(ids).logits[0], teacher(ids).logits[0]
        for position in range(len(labels) - 1):
            if labels[position + 1] != IGNORED_LABEL:
                row = slice(position, position + 1)
                terms += brute_force(student_logits[row], teacher_logits[row]).item()
                count += 1
    loss, _ = train_step(tmp_path, tokenizer, per_device_train_batch_size=8)
    assert loss == pytest.approx(terms / count, rel=1e-4)


def test_distillation_loss_in_evaluation_is_the_cross_entropy(tmp_path, tokenizer):
    student, teacher = make_tiny("gqa"), make_tiny("mha")
    args = TrainingArguments(output_dir=str(tmp_path))
    options = {"model": student, "args": args, "data_collator": batches(tokenizer)}
    distilled = DistillationTrainer(teacher=LiveTeacher(teacher), **options)
    plain = distillation.SlimTrainer(**options)
    assert distilled.evaluate(rows(8))["eval_loss"] == plain.evaluate(rows(8))["eval_loss"]


@pytest.mark.parametrize("adapted", [False, True])
def test_distillation_in_mixed_precision_where_layer_norm_returns_fp32_runs(monkeypatch, tmp_path, tokenizer, adapted):
    layer_norm = functional.layer_norm

    def on_a_gpu(*args):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(*args)
        return layer_norm(*(value.float() if isinstance(value, torch.Tensor) else value for value in args))

    monkeypatch.setattr(functional, "layer_norm", on_a_gpu)
    student, teacher = (make_tiny("opt", torch.bfloat16) for _ in range(2))
    if adapted:
        student = get_peft_model(student, LoraConfig(r=2, target_modules=["fc1"]))
    args = TrainingArguments(output_dir=str(tmp_path), bf16=True, max_steps=1, logging_steps=1, save_strategy="no")
    options = {"model": student, "args": args, "train_dataset": rows(8), "data_collator": batches(tokenizer)}
    trainer = DistillationTrainer(teacher=LiveTeacher(teacher), **options)
    trainer.train()
    # Of the same model, up to the rounding of bf16.
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-2
