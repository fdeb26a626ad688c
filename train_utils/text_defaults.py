"""What a run can train, and the defaults of runs on plain text."""

from collections.abc import Sequence

import torch

LORA, ALL_WEIGHTS, BLOCK_WEIGHTS, SCALES = "lora", "all", "block_weights", "scales"
TRAINED_PARTS = {
    LORA: "LoRA adapters",
    ALL_WEIGHTS: "all weights",
    BLOCK_WEIGHTS: "the weights of the decoder layers",
    SCALES: "one scale per head and FFN column, folded into the weights",
}
# Defaults of runs on plain text, measured by benchmarks/bench_recovery.py.
TEXT_DEFAULTS: dict[str, object] = {
    "--max_length": 512,
    "--val_dataset_size": 32,
    "--per_device_train_batch_size": 2,
    "--per_device_eval_batch_size": 1,
    "--num_train_epochs": 1,
    "--lr_scheduler_type": "cosine",
    "--warmup_steps": 0.05,
    "--peft_lora_r": 16,
    "--peft_lora_alpha": 32,
    "--peft_lora_dropout": 0,
    "--logging_steps": 10,
}
# Flags that choose the precision of training, or a device without a default for it.
PRECISION_FLAGS = ("--bf16", "--fp16", "--use_cpu")


def is_given(flag: str, argv: Sequence[str]) -> bool:
    """Whether ``argv`` has ``flag``, as ``--flag value`` or ``--flag=value``."""
    return any(argument.partition("=")[0] == flag for argument in argv)


def with_text_defaults(argv: list[str]) -> list[str]:
    """``argv`` after the defaults of runs on plain text, if it is one; later flags win.

    On a GPU with bf16, training is in mixed precision.
    """
    if not is_given("--train_text", argv):
        return argv
    defaults = dict(TEXT_DEFAULTS)
    if not is_given("--use_lora", argv):
        defaults["--train"] = BLOCK_WEIGHTS
    if not any(is_given(flag, argv) for flag in PRECISION_FLAGS) and _gpu_computes_in_bf16():
        defaults["--bf16"] = "true"
    return [*(str(word) for pair in defaults.items() for word in pair), *argv]


def _gpu_computes_in_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
