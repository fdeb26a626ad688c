"""``model_finetune.py`` on one CUDA device against the CPU, and on several against one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import model_slimming
from tests.conftest import random_text
from tests.integration.finetuning import losses, main
from tests.processes import run_ranks
from tests.tiny_models import make_tiny
from train_utils.finetune_args import parse_args

GPUS = torch.cuda.device_count()
NEEDS_TWO = pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices")
PARTS = ["lora", "block_weights", "all", "scales"]
SPLITS = {
    "ddp": [],
    "zero2": ["--deepspeed", "configs/deepspeed.json"],
    "zero3": ["--deepspeed", "configs/deepspeed_zero3.json"],
    "fsdp2": ["--fsdp", "true", "--fsdp_config", "configs/fsdp2.json"],
    "fsdp2 in host memory": ["--fsdp", "true", "--fsdp_config", '{"cpu_offload": true}'],
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, text_file) -> dict[str, tuple[Path, Path]]:
    """A dense and a pruned checkpoint, of a family with RMSNorm and of one with LayerNorm."""
    folder, checkpoints = tmp_path_factory.mktemp("models"), {}
    for name in ("gqa", "opt"):
        dense, pruned = folder / name, folder / f"{name}-pruned"
        make_tiny(name).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        argv = [dense, "--data_file", text_file, "--num_samples", 16, "--seqlen", 32, "--sparsity", 0.3]
        argv += ["--device", "cpu", "--skip_evaluate", "--save_pruned_weights", "--save_dir", pruned]
        model_slimming.main(model_slimming.build_parser().parse_args(list(map(str, argv))))
        checkpoints[name] = (dense, pruned / "pruned_weights")
    return checkpoints


@pytest.fixture
def argv(models, tmp_path, text_file):
    """Function that builds the arguments of a recovery of a family on a text, of a part, and more flags."""
    text = tmp_path / "train.txt"
    text.write_text(random_text(3000, 5))

    def build(name: str, part: str, *flags) -> list[str]:
        dense, pruned = models[name]
        argv = ["--model_name_or_path", pruned, "--distill_from", dense, "--train_text", text, "--train", part]
        argv += ["--max_length", 32, "--val_dataset_size", 4, "--max_train_tokens", 512, "--learning_rate", 1e-3]
        argv += ["--extra_val_set", f"text={text_file}", "--extra_val_seqlen", 16, "--eval_seqlens", 16]
        argv += ["--per_device_train_batch_size", 4, "--lr_scheduler_type", "constant", "--warmup_steps", 0]
        argv += ["--cache_dir", tmp_path / "cache", "--save_strategy", "no", "--logging_steps", 1]
        return list(map(str, [*argv, "--output_dir", tmp_path / "out", "--overwrite", "true", *flags]))

    return build


def assert_close(actual: dict[int, float], expected: dict[int, float]) -> None:
    """Losses by step are the same up to rounding, which Adam magnifies where a gradient is nearly zero."""
    first = min(expected)
    assert actual[first] == pytest.approx(expected[first], rel=1e-4)
    assert actual == pytest.approx(expected, rel=5e-3)


def record_of(output: Path) -> dict:
    record = json.loads((output / "run.json").read_text())
    assert record["finished"]
    return record


@pytest.mark.parametrize(("part", "cached"), [*((part, 0) for part in PARTS), ("lora", 8)])
def test_model_finetune_on_a_gpu_has_the_losses_of_the_cpu(argv, tmp_path, part, cached):
    flags = ["--bf16", "false", "--cache_teacher", cached]
    main(argv("gqa", part, *flags, "--use_cpu", "true"))
    on_cpu = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    main(argv("gqa", part, *flags))
    record = record_of(tmp_path / "out")
    assert record["peak_memory_mib"]["gpu"] > 0 and record["held_out"]["losses"]
    assert_close(losses(tmp_path / "out"), on_cpu)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "part", "checkpointing", "cached"),
    [
        *(("gqa", part, "false", 0) for part in PARTS),
        *(("opt", part, "true", 0) for part in ("lora", "scales")),
        ("opt", "block_weights", "false", 8),
    ],
)
def test_model_finetune_in_half_precision_on_a_gpu_lowers_the_loss(
    argv, tmp_path, name, part, checkpointing, cached, precision
):
    flags = [f"--{precision}", "true", "--gradient_checkpointing", checkpointing, "--cache_teacher", cached]
    main(argv(name, part, *flags, "--num_train_epochs", 4, "--stop_on_held_out", "false"))
    record_of(tmp_path / "out")
    trained = list(losses(tmp_path / "out").values())
    assert 0 < sum(trained[-4:]) < sum(trained[:4])


def test_model_finetune_in_fp16_trains_biases_beside_lora(argv, tmp_path):
    main(argv("opt", "lora", "--fp16", "true", "--peft_lora_bias", "all"))
    record_of(tmp_path / "out")


def test_model_finetune_without_a_launcher_uses_one_gpu(argv):
    training = parse_args(argv("gqa", "lora")).training
    assert training.n_gpu == training.world_size == 1 and training.device == torch.device("cuda:0")


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_TWO
@pytest.mark.parametrize(
    ("split", "part"),
    [
        *(("ddp", part) for part in PARTS),
        *((split, part) for split in ("zero2", "zero3", "fsdp2") for part in ("lora", "block_weights")),
        ("fsdp2 in host memory", "lora"),
    ],
)
def test_model_finetune_on_several_gpus_has_the_losses_of_one(argv, tmp_path, split, part):
    flags = ["--bf16", "false", "--stop_on_held_out", "false"]
    main(argv("gqa", part, *flags))
    alone = losses(tmp_path / "out")
    flags += ["--per_device_train_batch_size", 2]
    process = run_ranks(2, "model_finetune.py", *argv("gqa", part, *flags, *SPLITS[split]))
    assert process.returncode == 0, process.stderr
    assert record_of(tmp_path / "out")["processes"] == 2
    assert_close(losses(tmp_path / "out"), alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_TWO
@pytest.mark.parametrize("name", ["gqa", "opt"])
@pytest.mark.parametrize("split", SPLITS)
def test_model_finetune_in_bf16_on_several_gpus_lowers_the_loss(argv, tmp_path, name, split):
    flags = ["--bf16", "true", "--num_train_epochs", 8, "--stop_on_held_out", "false"]
    flags += ["--per_device_train_batch_size", 2, *SPLITS[split]]
    process = run_ranks(2, "model_finetune.py", *argv(name, "block_weights", *flags))
    assert process.returncode == 0, process.stderr
    trained = list(losses(tmp_path / "out").values())
    assert 0 < sum(trained[-4:]) < sum(trained[:4])
