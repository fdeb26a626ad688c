"""The flags of ``model_finetune.py``: the original's, the Trainer's, and those added since."""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from ppl_eval.ppl_dataset import name_eval_sets, split_eval_specs
from slim_utils.cli.app import ArgumentParser
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import check_inputs_outside, eval_files
from slim_utils.common.output_folder import output_lock
from train_utils.optional_packages import check_packages
from train_utils.prompts import TEMPLATES
from train_utils.run_folder import choose_run_folder

logger = logging.getLogger(__name__)

# Spellings of the original's recipe that the Trainer no longer knows.
RENAMED_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--overwrite_output_dir": "--overwrite",
    "--no_cuda": "--use_cpu",
    "--warmup_ratio": "--warmup_steps",
}
RENAMED_VALUES = {("--optim", "adamw_hf"): "adamw_torch"}
LORA_BIASES = ("none", "all", "lora_only")


@dataclass
class ModelArguments:
    """The model and its LoRA adapters."""

    model_name_or_path: str = field(default="", metadata={"help": "checkpoint folder or hub name"})
    use_lora: bool = field(default=False, metadata={"help": "train LoRA adapters instead of all weights"})
    peft_lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    peft_lora_alpha: int = field(default=16, metadata={"help": "the adapters' product is scaled by alpha / r"})
    peft_lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters"})
    peft_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "linear maps that get an adapter, comma-separated, or all-linear (default: those of the decoder "
            "layers, by the model's family)"
        },
    )
    peft_lora_bias: str = field(default="none", metadata={"help": f"biases to train: {', '.join(LORA_BIASES)}"})
    use_focal_loss: bool = field(default=False, metadata={"help": "weigh a token's loss by (1 - p)^gamma"})
    focal_loss_gamma: float = field(default=1.0, metadata={"help": "gamma of --use_focal_loss"})
    distill_from: str | None = field(
        default=None, metadata={"help": "checkpoint folder or hub name of a teacher, mostly the dense model"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run model code found in the checkpoint"})
    quantization_bit: int | None = field(default=None, metadata={"help": "refused"})
    auto_load: bool = field(default=False, metadata={"help": "refused"})


@dataclass
class DataArguments:
    """The instruction data, and the texts whose perplexity is watched."""

    train_data: str = field(default="alpaca", metadata={"help": "alpaca or gpt4_alpaca, from the hub"})
    data_path: str | None = field(
        default=None, metadata={"help": "json, jsonl, csv, tsv or parquet file, or hub name, instead"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of a sample; longer ones are cut"})
    cache_dataset: bool = field(default=True, metadata={"help": "keep the tokenised samples for the next run"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "where (default: $SLIMGPT_CACHE or ~/.cache/slimgpt)"}
    )
    prompt_template_name: str = field(default="alpaca", metadata={"help": ", ".join(TEMPLATES)})
    val_dataset_size: int = field(default=2000, metadata={"help": "rows held out for evaluation"})
    extra_val_set: str = field(
        default="wikitext2",
        metadata={"help": "texts for perplexity: wikitext2, ptb, FILE or NAME=FILE, comma-separated"},
    )
    extra_val_seqlen: int = field(default=128, metadata={"help": "window length while training"})
    eval_seqlens: list[int] | None = field(
        default=None,
        metadata={"help": "window lengths before and after training (default: --extra_val_seqlen and 2048)"},
    )
    bos: str = field(default="auto", metadata={"help": BOS_HELP, "choices": list(BOS_POLICIES)})
    extra_trainset: bool = field(default=False, metadata={"help": "refused"})


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """The Trainer's own, with three defaults of this suite."""

    output_dir: str = field(default="", metadata={"help": "folder to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run's --output_dir"})
    # A loss that is not finite has to be seen.
    logging_nan_inf_filter: bool = field(default=False)
    train_full_prompt: bool = field(default=False, metadata={"help": "train on the tokens of the prompt too"})

    def __post_init__(self) -> None:
        """Refuse to guess an output folder, then set up the devices as the Trainer does."""
        if not self.output_dir:
            raise ValueError("give the folder to write: --output_dir DIR")
        # The Trainer takes bf16 on a CPU only where it is told that there is nothing else.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.disable_tqdm is None:  # type: ignore[has-type]
            self.disable_tqdm = not sys.stderr.isatty()
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            # Every trained parameter takes part in every forward.
            self.ddp_find_unused_parameters = False
        super().__post_init__()


@dataclass
class SparseArguments:
    """Training that keeps pruned weights at zero."""

    is_mask_training: bool = field(default=False, metadata={"help": "keep the pruned weights of a zeroed model zero"})
    mask_config_dir: str | None = field(
        default=None, metadata={"help": "pruning.json, its folder, or a mask json (default: the model's pruning.json)"}
    )
    save_pruned_weights: bool = field(
        default=True, metadata={"help": "save the small model too after --is_mask_training"}
    )
    is_sparse_training: bool = field(default=False, metadata={"help": "refused"})
    coef: float = field(default=0.0, metadata={"help": "refused"})
    lr_multi: float = field(default=100.0, metadata={"help": "refused"})


# Flags that the original read and then ignored, and whose meaning cannot be given them today.
REFUSED_FLAGS = {
    "quantization_bit": "quantised weights cannot be trained here; leave it out, and quantise afterwards",
    "auto_load": "use --resume_from_checkpoint true to go on from the last checkpoint",
    "extra_trainset": "put all rows into one file and give it as --data_path",
    "is_sparse_training": "there is no sparsity penalty; prune first, then use --is_mask_training true",
    "coef": "there is no sparsity penalty; leave it out",
    "lr_multi": "there is no sparsity penalty; leave it out",
}


@dataclass
class FinetuneArguments:
    """All four groups.

    Attributes:
        run_folder: where the run trains: its output folder, or one inside it while that holds an earlier result.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    sparse: SparseArguments
    run_folder: Path = field(init=False)

    def flat(self) -> dict[str, Any]:
        """Every flag that differs from its default, as plain values for ``run.json``."""
        values = {}
        for group in (self.model, self.data, self.training, self.sparse):
            for option in dataclasses.fields(group):
                value = getattr(group, option.name)
                value = value.value if isinstance(value, Enum) else value
                if option.init and value != option.default:
                    values[option.name] = value if isinstance(value, (int, float, list, type(None))) else str(value)
        return values


class FinetuneParser(ArgumentParser, HfArgumentParser):
    """``HfArgumentParser`` whose errors are one line."""


def build_parser() -> FinetuneParser:
    """The parser of all four groups."""
    groups = (ModelArguments, DataArguments, TrainingArguments, SparseArguments)
    # The library's initialiser comes first in the order of classes, and mypy does not know it.
    options = {"prog": "model_finetune.py", "description": "Fine-tune a pruned model."}
    return FinetuneParser(groups, **options)  # type: ignore[arg-type]


def parse_args(words: list[str] | None = None) -> FinetuneArguments:
    """Read the command line (default: this process's) and check it before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    words = translate_legacy_flags(sys.argv[1:] if words is None else words)
    provide_single_process_group(words)
    parser = build_parser()
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args = FinetuneArguments(*parsed)
    check_args(args)
    return args


def translate_legacy_flags(words: list[str]) -> list[str]:
    """``words`` with the flags and values that the Trainer renamed since; each is said once."""
    result: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in RENAMED_FLAGS:
            logger.info("%s is called %s today", flag, RENAMED_FLAGS[flag])
            word = RENAMED_FLAGS[flag] + equals + value
        flag, given = (flag, value) if equals else (result[-1] if result else "", word)
        if (flag, given) in RENAMED_VALUES:
            new = RENAMED_VALUES[flag, given]
            logger.info("%s %s is called %s today", flag, given, new)
            word = f"{flag}={new}" if equals else new
        result.append(word)
    return result


def provide_single_process_group(words: list[str]) -> None:
    """Let DeepSpeed start without a launcher, as a group of one process."""
    if any(word.partition("=")[0] == "--deepspeed" for word in words) and "RANK" not in os.environ:
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update({name: value for name, value in group.items() if name not in os.environ})


def check_args(args: FinetuneArguments) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the flag to change.
    """
    for group in (args.model, args.data, args.training, args.sparse):
        for option in dataclasses.fields(group):
            if option.name in REFUSED_FLAGS and getattr(group, option.name) != option.default:
                raise UserError(f"--{option.name} {getattr(group, option.name)}: {REFUSED_FLAGS[option.name]}")
    check_model_args(args)
    check_data_args(args.data)
    check_distribution(args.training)
    check_packages(args.training)
    # A live run is named first; what it has written so far is nobody else's to replace.
    with output_lock(args.training.output_dir, "--output_dir"):
        check_output_dir(args)


def check_model_args(args: FinetuneArguments) -> None:
    """Check the flags of the model, the adapters and the loss."""
    model = args.model
    if not model.model_name_or_path:
        raise UserError("give the model to train: --model_name_or_path DIR")
    if model.peft_lora_bias not in LORA_BIASES:
        raise UserError(f"--peft_lora_bias {model.peft_lora_bias}: choose one of {', '.join(LORA_BIASES)}")
    if model.use_lora and model.peft_lora_r < 1:
        raise UserError(f"--peft_lora_r {model.peft_lora_r}: at least 1")
    losses = {
        "--use_focal_loss": model.use_focal_loss,
        "--label_smoothing_factor": args.training.label_smoothing_factor,
        "--distill_from": model.distill_from is not None,
    }
    chosen = [flag for flag, value in losses.items() if value]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other; leave one out")
    if args.sparse.mask_config_dir and not args.sparse.is_mask_training:
        raise UserError("--mask_config_dir has no effect without --is_mask_training true")


def check_data_args(data: DataArguments) -> None:
    """Check the flags of the data."""
    if data.prompt_template_name not in TEMPLATES:
        raise UserError(f"--prompt_template_name {data.prompt_template_name}: choose one of {', '.join(TEMPLATES)}")
    for name, lowest in (("max_length", 2), ("val_dataset_size", 0), ("extra_val_seqlen", 2)):
        if getattr(data, name) < lowest:
            raise UserError(f"--{name} {getattr(data, name)}: at least {lowest}")
    if any(seqlen < 2 for seqlen in data.eval_seqlens or ()):
        raise UserError("--eval_seqlens: at least 2")
    if "validation" in name_eval_sets(split_eval_specs(data.extra_val_set), "--extra_val_set"):
        raise UserError("--extra_val_set: validation is the name of the held-out rows; choose another: NAME=FILE")


def check_distribution(training: TrainingArguments) -> None:
    """Every process has to hold whole weights: they are masked, fused and saved."""
    plugin = training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError("--deepspeed: ZeRO stage 3 splits the weights; use stage 2 (configs/deepspeed.json)")
    if training.fsdp:
        raise UserError("--fsdp splits the weights; use --deepspeed configs/deepspeed.json")


def check_output_dir(args: FinetuneArguments) -> None:
    """Check ``--output_dir``, and find the folder to train in and the checkpoint to go on from.

    Raises:
        UserError: if it may not be written, holds an input of the run, or there is no such checkpoint.
    """
    training = args.training
    args.run_folder, training.resume_from_checkpoint = choose_run_folder(
        Path(training.output_dir), training.overwrite, training.resume_from_checkpoint
    )
    deepspeed = training.deepspeed if isinstance(training.deepspeed, str) else None
    inputs: dict[str, Sequence[str | None]] = {
        "--model_name_or_path": [args.model.model_name_or_path],
        "--distill_from": [args.model.distill_from],
        "--data_path": [args.data.data_path],
        "--mask_config_dir": [args.sparse.mask_config_dir],
        "--extra_val_set": eval_files(split_eval_specs(args.data.extra_val_set)),
        "--deepspeed": [deepspeed],
    }
    check_inputs_outside(Path(training.output_dir), "--output_dir", inputs)
