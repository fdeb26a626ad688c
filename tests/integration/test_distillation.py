"""``model_finetune.py --distill_from``, run as a user runs it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slim_utils.common.errors import UserError
from tests.integration.finetuning import logits, losses, main, run
from tests.processes import run_ranks
from tests.tiny_models import VOCAB, make_tiny

# On a CPU, the Trainer supports bf16 only.
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher ‖ student) of logits, mean over tokens."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def test_distill_from_the_dense_model_lowers_the_divergence(slim, argv, tmp_path, checkpoint, samples):
    base, out = slim / "pruned_weights", tmp_path / "out"
    flags = ["--use_lora", "true", "--num_train_epochs", 6, "--logging_steps", 1]
    flags += ["--train_full_prompt", "true", "--distill_from", checkpoint]
    main(argv(base, *flags))
    trained = losses(out)
    assert trained[max(trained)] < 0.7 * trained[1]
    dense = logits(checkpoint, samples)
    assert divergence(dense, logits(out / "lora_fused_model", samples)) < 0.8 * divergence(dense, logits(base, samples))
    assert json.loads((out / "run.json").read_text())["arguments"]["distill_from"] == str(checkpoint)

    # The output has the same tensors as that of a run without a teacher.
    distilled = {path.relative_to(out): load_file(path).keys() for path in out.rglob("*.safetensors")}
    main(argv(base, "--use_lora", "true", "--overwrite", "true"))
    assert distilled == {path.relative_to(out): load_file(path).keys() for path in out.rglob("*.safetensors")}


@pytest.mark.slow
def test_distill_from_without_training_keeps_the_evaluation_losses(slim, argv, tmp_path, checkpoint):
    entries = []
    for teacher in ([], ["--distill_from", checkpoint]):
        flags = ["--use_lora", "true", "--eval_steps", 1, "--learning_rate", 0, "--overwrite", "true", *teacher]
        main(argv(slim / "pruned_weights", *flags))
        log = json.loads((tmp_path / "out" / "run.json").read_text())["log"]
        entries.append([entry["eval_validation_loss"] for entry in log if "eval_validation_loss" in entry])
    assert entries[0] and entries[0] == entries[1]


@pytest.mark.parametrize("dtype", ["--bf16", pytest.param("--fp16", marks=NEEDS_CUDA)])
def test_distill_from_in_half_precision_lowers_the_loss(slim, argv, tmp_path, checkpoint, dtype):
    flags = ["--learning_rate", 1e-3, "--num_train_epochs", 3, dtype, "true", "--distill_from", checkpoint]
    main(argv(slim / "pruned_weights", *flags))
    trained = losses(tmp_path / "out")
    assert 0 < trained[max(trained)] < trained[1]


def test_distill_from_an_unsuitable_teacher_is_one_line(slim, argv, tmp_path, checkpoint, tokenizer):
    wider, renamed, damaged = tmp_path / "wider", tmp_path / "renamed", tmp_path / "damaged"
    make_tiny("gqa", vocab_size=VOCAB + 8).save_pretrained(wider)
    tokenizer.save_pretrained(wider)
    shutil.copytree(checkpoint, renamed)
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(text.replace('"w5"', '"x5"'))
    shutil.copytree(checkpoint, damaged)
    (damaged / "model.safetensors").write_bytes(b"half")
    messages = {
        wider: f"vocabulary size {VOCAB + 8}, that of the student is {VOCAB}",
        renamed: "the tokens of its tokenizer differ from those of the student",
        damaged: "cannot be loaded",
    }
    for folder, message in messages.items():
        with pytest.raises(UserError, match=f"--distill_from.* {folder}: {message}") as error:
            main(argv(slim / "pruned_weights", "--use_lora", "true", "--distill_from", folder))
        assert "\n" not in str(error.value)
    process = run(argv(slim / "pruned_weights", "--use_lora", "true", "--distill_from", wider))
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == f"model_finetune.py: error: --distill_from {wider}: {messages[wider]}"
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_cached_teacher_of_all_tokens_trains_as_the_teacher_itself(slim, argv, tmp_path, checkpoint):
    flags = ["--num_train_epochs", 2, "--logging_steps", 1, "--distill_from", checkpoint, "--overwrite", "true"]
    main(argv(slim / "pruned_weights", *flags))
    expected = losses(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    flags += ["--cache_teacher", VOCAB - 1, "--cache_dir", tmp_path / "cache"]
    main(argv(slim / "pruned_weights", *flags))
    assert len(list((tmp_path / "cache").glob("teacher-*/predictions.arrow"))) == 1
    assert losses(tmp_path / "out") == pytest.approx(expected[0], rel=1e-4)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(weights[name], expected[1][name], atol=1e-5) for name in weights)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache_teacher", 8], "--cache_teacher 8: .*; add --distill_from DENSE"),
        (["--cache_teacher", -1, "--distill_from", "DENSE"], "--cache_teacher -1: at least 0"),
        (["--cache_teacher", VOCAB, "--distill_from", "DENSE"], f"--cache_teacher {VOCAB}: below the vocabulary size"),
    ],
)
def test_cache_teacher_with_wrong_flags_is_refused(slim, argv, tmp_path, checkpoint, flags, message):
    flags = [checkpoint if flag == "DENSE" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        main(argv(slim / "pruned_weights", *flags))
    assert not (tmp_path / "out").exists()


def test_distill_from_on_two_processes_gives_the_losses_of_one(slim, argv, tmp_path, checkpoint):
    flags = ["--use_lora", "true", "--peft_lora_dropout", 0, "--logging_steps", 1, "--distill_from", checkpoint]
    flags += ["--gradient_accumulation_steps"]
    main(argv(slim / "pruned_weights", *flags, 4))
    alone = losses(tmp_path / "out")
    process = run_ranks(2, "model_finetune.py", *argv(slim / "pruned_weights", *flags, 2, "--overwrite", "true"))
    assert process.returncode == 0, process.stderr
    assert losses(tmp_path / "out") == pytest.approx(alone, rel=1e-4)


def test_distillation_from_the_model_to_train_warns(slim, argv, tmp_path, checkpoint, caplog):
    base = slim / "pruned_weights"
    (tmp_path / "link").symlink_to(base)
    for teacher in (base, tmp_path / "link", checkpoint):
        caplog.clear()
        main(argv(base, "--distill_from", teacher, "--max_steps", 1, "--overwrite", "true"))
        warned = f"--distill_from {teacher}: the model to train, which has nothing to learn from itself" in caplog.text
        assert warned == (teacher != checkpoint)
