"""Flags of ``model_finetune.py``: those of the original script, of the Trainer, and later ones."""

import dataclasses
import logging
import os
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, SchedulerType, Seq2SeqTrainingArguments

from slim_utils.cli.app import ArgumentParser
from slim_utils.common.bos import BOS_HELP, BOS_POLICIES
from slim_utils.common.errors import UserError
from train_utils.finetune_checks import LORA_BIASES, check_args, use_one_gpu, warn_without_effect
from train_utils.finetune_dataset import default_cache_dir
from train_utils.prompts import TEMPLATES
from train_utils.sharding_checks import offloads_to_cpu, shards_weights
from train_utils.text_defaults import (
    ALL_WEIGHTS,
    LORA,
    TRAINED_PARTS,
    is_given,
    with_text_defaults,
)

logger = logging.getLogger(__name__)

# Spellings in the original's recipe that the Trainer has renamed.
RENAMED_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--overwrite_output_dir": "--overwrite",
    "--no_cuda": "--use_cpu",
    "--warmup_ratio": "--warmup_steps",
}
RENAMED_VALUES = {("--optim", "adamw_hf"): "adamw_torch"}


@dataclass
class ModelArguments:
    """Flags of the model, its LoRA adapters and the loss."""

    model_name_or_path: str = field(default="", metadata={"help": "checkpoint folder or hub name"})
    use_lora: bool = field(default=False, metadata={"help": "train LoRA adapters instead of all weights"})
    train: str | None = field(
        default=None,
        metadata={
            "help": "what to train: "
            + "; ".join(f"{name} ({text})" for name, text in TRAINED_PARTS.items())
            + " (default: lora with --use_lora true, block_weights with --train_text, else all)",
            "choices": list(TRAINED_PARTS),
        },
    )
    peft_lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    peft_lora_alpha: int = field(default=16, metadata={"help": "scale of the adapters, as alpha / r"})
    peft_lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters"})
    peft_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "linear modules to adapt, comma-separated, or all-linear (default: the linear modules of the "
            "family's decoder layers)"
        },
    )
    peft_lora_bias: str = field(default="none", metadata={"help": f"biases to train: {', '.join(LORA_BIASES)}"})
    use_focal_loss: bool = field(default=False, metadata={"help": "weight the loss of a token by (1 - p)^gamma"})
    focal_loss_gamma: float = field(default=1.0, metadata={"help": "gamma of --use_focal_loss"})
    distill_from: str | None = field(
        default=None, metadata={"help": "checkpoint folder or hub name of the teacher, usually the dense model"}
    )
    cache_teacher: int = field(
        default=0,
        metadata={
            "help": "run the teacher once and store its N most likely tokens of every position (0: run it always)"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run model code found in the checkpoint"})
    quantization_bit: int | None = field(default=None, metadata={"help": "refused"})
    auto_load: bool = field(default=False, metadata={"help": "refused"})

    @property
    def trained_part(self) -> str:
        """What the run trains, a key of ``TRAINED_PARTS``."""
        return LORA if self.use_lora else self.train or ALL_WEIGHTS


@dataclass
class DataArguments:
    """Flags of the training data and of the perplexity texts."""

    train_data: str = field(default="alpaca", metadata={"help": "alpaca or gpt4_alpaca, from the hub"})
    data_path: str | None = field(
        default=None,
        metadata={
            "help": "json, jsonl, csv, tsv or parquet file, or hub name, with rows of instruction, input and output, "
            "of messages, or of ShareGPT's conversations; replaces --train_data"
        },
    )
    train_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "plain text to train on, every token a target, instead of instructions: wikitext2, c4, a hub name, "
            "or a txt, json[l], csv, tsv or parquet file (also .gz, .zst); NAME:WEIGHT or FILE:WEIGHT in a mixture"
        },
    )
    max_train_tokens: float = field(default=1e6, metadata={"help": "tokens of --train_text to train on"})
    skip_train_tokens: float = field(
        default=0, metadata={"help": "tokens of --train_text to leave out, those that earlier rounds trained on"}
    )
    max_length: int = field(
        default=512, metadata={"help": "tokens per sample, or per window of text; longer samples are truncated"}
    )
    cache_dataset: bool = field(default=True, metadata={"help": "cache the tokenised samples or windows"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "cache folder (default: $SLIMGPT_CACHE or ~/.cache/slimgpt)"}
    )
    prompt_template_name: str = field(
        default="alpaca",
        metadata={
            "help": f"template of instruction rows: one of {', '.join(TEMPLATES)}; conversations always use chat, the "
            "tokenizer's chat template"
        },
    )
    val_dataset_size: int = field(default=2000, metadata={"help": "rows, or windows of text, held out for evaluation"})
    extra_val_set: str = field(
        default="wikitext2",
        metadata={"help": "perplexity texts: wikitext2, ptb, FILE or NAME=FILE, comma-separated"},
    )
    extra_val_seqlen: int = field(default=128, metadata={"help": "window length during training"})
    eval_seqlens: list[int] | None = field(
        default=None,
        metadata={"help": "window lengths before and after training (default: --extra_val_seqlen and 2048)"},
    )
    bos: str = field(default="auto", metadata={"help": BOS_HELP, "choices": list(BOS_POLICIES)})
    extra_trainset: bool = field(default=False, metadata={"help": "refused"})


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """Flags of the Seq2SeqTrainer, with changed defaults, and further ones."""

    output_dir: str = field(default="", metadata={"help": "folder to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run's --output_dir"})
    check_only: bool = field(
        default=False, metadata={"help": "check flags, models and texts, and end before the weights are loaded"}
    )
    # A non-finite loss must stay visible.
    logging_nan_inf_filter: bool = field(default=False)
    train_full_prompt: bool = field(default=False, metadata={"help": "also train on the prompt tokens"})
    stop_on_held_out: bool | None = field(
        default=None,
        metadata={
            "help": "end with the weights of the lowest loss on the held-out samples, and stop where it rises "
            "(default: with --train_text, unless --load_best_model_at_end is true or weights are sharded)"
        },
    )

    def __post_init__(self) -> None:
        """Require ``output_dir``, set the defaults, then set up the devices as the Trainer does.

        Raises:
            ValueError: if ``output_dir`` is empty.
        """
        if not self.output_dir:
            raise ValueError("give the folder to write: --output_dir DIR")
        # The Trainer takes --fsdp without a value; true and false are the values of its other switches.
        self.fsdp: Any = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        # The Trainer accepts bf16 on a CPU only with use_cpu.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        # The Trainer also takes the options of earlier versions, as in --fsdp "full_shard offload".
        offloads = bool(self.fsdp) and ("offload" in str(self.fsdp) or offloads_to_cpu(self.fsdp_config))
        if offloads and on_gpu and self.ddp_backend is None:  # type: ignore[has-type]
            # The norm of gradients in host memory is reduced there, which NCCL cannot do.
            self.ddp_backend = "cuda:nccl,cpu:gloo"
        if self.disable_tqdm is None:  # type: ignore[has-type]
            self.disable_tqdm = not sys.stderr.isatty()
        if self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            # Every trained parameter is used in every forward.
            self.ddp_find_unused_parameters = False
        super().__post_init__()


@dataclass
class SparseArguments:
    """Flags of training that keeps pruned weights at zero."""

    is_mask_training: bool = field(default=False, metadata={"help": "keep the pruned weights of a masked model at 0"})
    mask_config_dir: str | None = field(
        default=None, metadata={"help": "pruning.json, its folder, or a mask json (default: pruning.json of the model)"}
    )
    save_pruned_weights: bool = field(
        default=True, metadata={"help": "with --is_mask_training, also save the pruned model"}
    )
    is_sparse_training: bool = field(default=False, metadata={"help": "refused"})
    coef: float = field(default=0.0, metadata={"help": "refused"})
    lr_multi: float = field(default=100.0, metadata={"help": "refused"})


@dataclass
class FinetuneArguments:
    """All flags of a fine-tuning run, in four groups.

    Attributes:
        run_folder: folder that the run trains in: ``output_dir``, or a folder inside it while ``output_dir`` still
            holds an earlier result.
        model_sets_learning_rate: whether ``learning_rate`` is still to be set, by the weights of the model.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    sparse: SparseArguments
    run_folder: Path = field(init=False)
    model_sets_learning_rate: bool = field(init=False, default=False)

    @property
    def cache_dir(self) -> Path:
        """Folder of the caches."""
        return Path(self.data.cache_dir) if self.data.cache_dir else default_cache_dir()

    @property
    def stops_on_held_out(self) -> bool:
        """Whether held-out samples choose the weights that the run ends with."""
        if self.training.stop_on_held_out is not None:
            return self.training.stop_on_held_out
        # Every evaluation is a step of a schedule by plateaus.
        by_plateau = self.training.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        excluded = self.training.load_best_model_at_end or shards_weights(self.training) or by_plateau
        return self.data.train_text is not None and self.data.val_dataset_size > 0 and not excluded

    def flat(self) -> dict[str, Any]:
        """Flags that differ from their default, and the learning rate if the model sets it, for ``run.json``."""
        values = {}
        for group in (self.model, self.data, self.training, self.sparse):
            for option in dataclasses.fields(group):
                value = getattr(group, option.name)
                value = value.value if isinstance(value, Enum) else value
                set_by_model = option.name == "learning_rate" and self.model_sets_learning_rate
                if option.init and (value != option.default or set_by_model):
                    values[option.name] = value if isinstance(value, (int, float, list, type(None))) else str(value)
        return values


class FinetuneParser(ArgumentParser, HfArgumentParser):
    """``HfArgumentParser`` with one-line errors."""


def build_parser() -> FinetuneParser:
    """Parser of all four groups."""
    groups = (ModelArguments, DataArguments, TrainingArguments, SparseArguments)
    # HfArgumentParser.__init__ comes first in the MRO at runtime; mypy does not see that.
    options: dict[str, Any] = {"prog": "model_finetune.py", "description": "Fine-tune a pruned model."}
    # Defaults depend on which flags are given, by their whole names.
    return FinetuneParser(groups, allow_abbrev=False, **options)  # type: ignore[arg-type]


def parse_args(argv: list[str] | None = None) -> FinetuneArguments:
    """Parse ``argv`` (default: ``sys.argv[1:]``) and check the flags before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    given = translate_legacy_flags(sys.argv[1:] if argv is None else argv)
    argv = with_text_defaults(given)
    provide_single_process_group(argv)
    parser = build_parser()
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args = FinetuneArguments(*parsed)
    warn_without_effect(args, given)
    args.model.use_lora = args.model.use_lora or args.model.train == LORA
    check_args(args)
    use_one_gpu(args.training)
    args.model_sets_learning_rate = args.data.train_text is not None and not is_given("--learning_rate", argv)
    return args


def translate_legacy_flags(argv: list[str]) -> list[str]:
    """``argv`` with legacy flags and values replaced by the Trainer's current ones; logs each replacement.

    Flags with dashes, which the parser also takes, get underscores.
    """
    result: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = f"--{flag[2:].replace('-', '_')}"
            argument = flag + equals + value
        if flag in RENAMED_FLAGS:
            logger.info("%s has been renamed to %s", flag, RENAMED_FLAGS[flag])
            argument = RENAMED_FLAGS[flag] + equals + value
        flag, value = (flag, value) if equals else (result[-1] if result else "", argument)
        if (flag, value) in RENAMED_VALUES:
            new_value = RENAMED_VALUES[flag, value]
            logger.info("%s %s has been renamed to %s", flag, value, new_value)
            argument = f"{flag}={new_value}" if equals else new_value
        result.append(argument)
    return result


def provide_single_process_group(argv: list[str]) -> None:
    """Set the environment of a single-process group, so that DeepSpeed starts without a launcher."""
    if is_given("--deepspeed", argv) and "RANK" not in os.environ:
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update({name: value for name, value in group.items() if name not in os.environ})
