"""What a run can train, and the defaults of runs on plain text."""

from collections.abc import Sequence

LORA, ALL_WEIGHTS, BLOCK_WEIGHTS, SCALES = "lora", "all", "block_weights", "scales"
TRAINED_PARTS = {
    LORA: "LoRA adapters",
    ALL_WEIGHTS: "all weights",
    BLOCK_WEIGHTS: "the weights of the decoder layers",
    SCALES: "one scale per head and FFN column, folded into the weights",
}
# Defaults of runs on plain text, measured by benchmarks/bench_recovery.py.
TEXT_DEFAULTS = {
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
TEXT_LEARNING_RATES = {LORA: 5e-4, ALL_WEIGHTS: 3e-4, BLOCK_WEIGHTS: 3e-4, SCALES: 5e-3}


def is_given(flag: str, argv: Sequence[str]) -> bool:
    """Whether ``argv`` has ``flag``, as ``--flag value`` or ``--flag=value``."""
    return any(argument.partition("=")[0] == flag for argument in argv)


def with_text_defaults(argv: list[str]) -> list[str]:
    """``argv`` after the defaults of runs on plain text, if it is one; later flags win."""
    if not is_given("--train_text", argv):
        return argv
    part = {} if is_given("--use_lora", argv) else {"--train": BLOCK_WEIGHTS}
    return [*(str(word) for pair in (TEXT_DEFAULTS | part).items() for word in pair), *argv]
