"""Stored predictions of a teacher: the divergence from them against its definition in fp64, and the cache itself."""

import pytest
import torch
from torch.utils.data import DataLoader

from slim_utils.common.errors import UserError
from tests.tiny_models import VOCAB, make_tiny
from tests.unit.train_utils.test_distillation import as_batch, batches, rows
from train_utils.distillation import LiveTeacher
from train_utils.teacher_cache import (
    PREDICTIONS_FILE,
    CachedTeacher,
    cache_predictions,
    samples_hash,
    top_divergence,
    top_log_probabilities,
)

POSITIONS, TOKENS, TOP = 7, 50, 5


@pytest.fixture
def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a teacher and of a student, in fp64."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, POSITIONS, TOKENS, generator=generator, dtype=torch.float64)
    return tuple(logits.log_softmax(-1))


def whole_divergence(teacher, student) -> torch.Tensor:
    return (teacher.exp() * (teacher - student)).sum()


def by_definition(teacher, student, count: int) -> torch.Tensor:
    """KL of the distributions in which all tokens but the teacher's ``count`` most likely ones are one event."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(teacher.exp(), student.exp(), strict=True):
        top = p.argsort(descending=True)[:count].tolist()
        others = [token for token in range(TOKENS) if token not in top]
        total = total + sum(p[token] * (p[token] / q[token]).log() for token in top)
        total = total + p[others].sum() * (p[others].sum() / q[others].sum()).log()
    return total


@pytest.mark.parametrize("count", [1, TOP, TOKENS - 1])
def test_top_divergence_and_its_gradient_match_the_definition(distributions, count):
    teacher, student = distributions
    losses, gradients = [], []
    for loss in (lambda q: top_divergence(*top_log_probabilities(teacher, count), q, slice(None)), by_definition):
        logits = student.clone().requires_grad_()
        arguments = (logits.log_softmax(-1),) if loss is not by_definition else (teacher, logits.log_softmax(-1), count)
        losses.append(loss(*arguments))
        gradients.append(torch.autograd.grad(losses[-1], logits)[0])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    assert torch.allclose(*gradients, atol=1e-12)


def test_top_divergence_is_below_the_whole_one_by_the_divergence_within_the_rest(distributions):
    teacher, student = distributions
    tokens, target = top_log_probabilities(teacher, TOP)
    rest = torch.zeros((), dtype=torch.float64)
    for p, q, top in zip(teacher.exp(), student.exp(), tokens, strict=True):
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[top] = False
        share = p[others].sum()
        rest += share * (p[others] / share * (p[others] / share / (q[others] / q[others].sum())).log()).sum()
    assert rest > 0
    difference = whole_divergence(teacher, student) - top_divergence(tokens, target, student, slice(None))
    assert difference.item() == pytest.approx(rest.item(), rel=1e-10)


def test_top_divergence_of_a_chunk_uses_its_rows(distributions):
    teacher, student = distributions
    tokens, target = top_log_probabilities(teacher, TOP)
    parts = [top_divergence(tokens, target, student[chunk], chunk) for chunk in (slice(0, 3), slice(3, 6), slice(6, 9))]
    assert sum(parts).item() == pytest.approx(top_divergence(tokens, target, student, slice(0, 9)).item())


def fill(folder, teacher, tokenizer, count: int, dataset=None) -> None:
    dataset = dataset or rows(8)
    loader = DataLoader(dataset, 3, collate_fn=batches(tokenizer))
    cache_predictions(folder, lambda: teacher.top, lambda: iter(loader), len(dataset), count)


def test_cached_teacher_has_the_predictions_of_the_teacher_in_any_order_and_padding(tmp_path, tokenizer):
    teacher = LiveTeacher(make_tiny("gqa"))
    fill(tmp_path / "cache", teacher, tokenizer, VOCAB - 1)
    cached, collate, samples = CachedTeacher(tmp_path / "cache", VOCAB - 1), batches(tokenizer), list(rows(8))
    for order in ([5, 0], [7, 3, 1], [2]):
        batch = collate([samples[index] for index in order])
        count = int((batch["labels"][:, 1:] >= 0).sum())
        predicted = torch.randn(count, VOCAB).log_softmax(-1)
        values = [source.targets(batch)(predicted, slice(0, count)).item() for source in (cached, teacher)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_cache_is_filled_once(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    fill(tmp_path / "cache", LiveTeacher(make_tiny("gqa")), tokenizer, 4)
    content = (tmp_path / "cache" / "predictions.arrow").read_bytes()
    assert "of the probability" in caplog.text
    fill(tmp_path / "cache", None, tokenizer, 4)
    assert (tmp_path / "cache" / "predictions.arrow").read_bytes() == content
    assert "using the predictions of the teacher cached in" in caplog.text


def test_equal_samples_are_stored_once(tmp_path, tokenizer):
    dataset = rows(1).select([0, 0, 0])
    fill(tmp_path / "cache", LiveTeacher(make_tiny("gqa")), tokenizer, 4, dataset)
    cached = CachedTeacher(tmp_path / "cache", 4)
    assert len(cached._table) == 1
    batch = batches(tokenizer)([dataset[0], dataset[2]])
    count = int((batch["labels"][:, 1:] >= 0).sum())
    assert cached.targets(batch)(torch.zeros(count, VOCAB).log_softmax(-1), slice(None)).isfinite()


def test_interrupted_cache_is_not_used(tmp_path, tokenizer):
    class Failing:
        def top(self, inputs, count):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cache", Failing(), tokenizer, 4)
    assert not (tmp_path / "cache").exists()


def test_damaged_cache_is_named(tmp_path):
    for content in (None, b"xx"):
        if content is not None:
            (tmp_path / PREDICTIONS_FILE).write_bytes(content)
        with pytest.raises(UserError, match=f"the predictions of the teacher cached in {tmp_path} cannot be read"):
            CachedTeacher(tmp_path, 4)


def test_cache_in_a_folder_that_cannot_be_made_is_refused(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_teacher: .*file.*--cache_dir"):
        fill(tmp_path / "file" / "cache", LiveTeacher(make_tiny("gqa")), tokenizer, 4)


def test_top_of_a_live_teacher_is_that_of_its_logits(samples):
    model = make_tiny("gqa")
    tokens, target = LiveTeacher(model).top(as_batch(samples), 4)
    with torch.no_grad():
        expected = model(samples).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert torch.equal(tokens, expected.topk(4).indices)
    assert torch.allclose(target[:, :-1], expected.topk(4).values, atol=1e-6)
    assert torch.allclose(target.exp().sum(-1), torch.ones(len(target)))


def test_samples_hash_depends_on_tokens_labels_and_order():
    dataset = rows(4)
    changed = dataset.map(lambda row, index: {"labels": [*row["labels"][:-1], index]}, with_indices=True)
    hashes = {samples_hash(part) for part in (dataset, dataset.select([1, 0, 2, 3]), dataset.select([0, 1]), changed)}
    assert len(hashes) == 4
    assert samples_hash(rows(4)) in hashes
