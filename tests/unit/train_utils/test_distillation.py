"""KL divergence from a teacher against its formula in fp64, for any chunk size, and with gradient accumulation."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from tests.conftest import VOCAB, make_tiny
from train_utils import distillation
from train_utils.distillation import DistillationTrainer, divergence, target_logits
from train_utils.finetune_args import TrainingArguments
from train_utils.finetune_dataset import IGNORED_LABEL


def random_logits(tokens: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(tokens, 11, generator=torch.Generator().manual_seed(seed))


def brute_force(student, teacher) -> torch.Tensor:
    """KL(teacher ‖ student) summed over tokens, in fp64, by its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for student_row, teacher_row in zip(student.double(), teacher.double(), strict=True):
        q, p = (row.exp() / row.exp().sum() for row in (student_row, teacher_row))
        total = total + sum(p[index] * (p[index].log() - q[index].log()) for index in range(len(p)))
    return total


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
def test_divergence_value_and_gradient_match_the_formulas(monkeypatch, chunk):
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", chunk)
    student, teacher = random_logits(7, 0).requires_grad_(), random_logits(7, 1)
    loss = divergence(student, teacher)
    plain = student.detach().clone().requires_grad_()
    expected = brute_force(plain, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(student.grad, plain.grad, atol=1e-5)
    assert torch.allclose(student.grad, student.softmax(-1) - teacher.softmax(-1), atol=1e-5)


def test_divergence_of_equal_logits_is_zero():
    student = random_logits(5, 4).requires_grad_()
    loss = divergence(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divergence_of_half_precision_logits_is_computed_in_fp32(dtype):
    student, teacher = random_logits(6, 5).to(dtype).requires_grad_(), random_logits(6, 6).to(dtype)
    loss = divergence(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(brute_force(student, teacher).item(), rel=1e-5)
    loss.backward()
    assert student.grad.dtype == dtype


def test_divergence_of_large_logits_is_finite():
    student, teacher = random_logits(6, 7, 1e4).requires_grad_(), random_logits(6, 8, 1e4)
    loss = divergence(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_target_logits_skips_ignored_labels():
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[1, IGNORED_LABEL, 2, IGNORED_LABEL], [IGNORED_LABEL, 0, IGNORED_LABEL, IGNORED_LABEL]])
    # Position t predicts token t + 1: the third token in the first row, the second token in the second row.
    assert torch.equal(target_logits(logits, labels), torch.stack([logits[0, 1], logits[1, 0]]))


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
    trainer = DistillationTrainer(teacher=teacher, **options)
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
    distilled = DistillationTrainer(teacher=teacher, **options)
    plain = distillation.SlimTrainer(**options)
    assert distilled.evaluate(rows(8))["eval_loss"] == plain.evaluate(rows(8))["eval_loss"]
