"""Data of a run of ``model_finetune.py``: its training samples and evaluation windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppl_eval.ppl_dataset import DEFAULT_EVAL_SEQLENS, EvalSets, load_eval_sets, split_eval_specs
from slim_utils.common.bos import calibration_bos
from slim_utils.common.ngrams import NgramSample
from slim_utils.text_mixture import parse_text_sources
from train_utils.finetune_args import DataArguments, FinetuneArguments
from train_utils.finetune_dataset import FinetuneData, SampleSettings, load_finetune_data
from train_utils.packed_text import FLAG, TextSettings, check_texts, load_text_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_settings(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TextSettings:
    """Settings of the windows of ``--train_text``."""
    return TextSettings(
        data.max_length,
        data.max_train_tokens,
        data.val_dataset_size,
        calibration_bos(tokenizer, data.bos),
        data.skip_train_tokens,
    )


def check_data(args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> None:
    """Check that evaluation texts, instruction rows and training texts can be read.

    Raises:
        UserError: naming the flag to change.
    """
    data = args.data
    load_windows(data, tokenizer, max_positions)
    if data.train_text is None:
        load_samples(args, tokenizer, {}, NgramSample.of_windows([]))
    else:
        check_texts(parse_text_sources(FLAG, data.train_text), text_settings(data, tokenizer))


def load_samples(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, windows: EvalSets, calibrated: NgramSample
) -> FinetuneData:
    """Instruction rows, or windows of text that overlap neither with ``windows`` nor with what calibrated the model."""
    data = args.data
    cache = args.cache_dir if data.cache_dataset else None
    if data.train_text is None:
        settings = SampleSettings(data.prompt_template_name, data.max_length, args.training.train_full_prompt)
        return load_finetune_data(data.train_data, data.data_path, tokenizer, settings, data.val_dataset_size, cache)
    excluded = {
        "the calibration samples of the model": calibrated,
        "the texts of --extra_val_set": NgramSample.of_windows(windows.values()),
    }
    sources = parse_text_sources(FLAG, data.train_text)
    return load_text_data(sources, tokenizer, text_settings(data, tokenizer), excluded, cache)


def final_seqlens(data: DataArguments, max_positions: int) -> list[int]:
    """Window lengths of the evaluation before and after training."""
    default_seqlens = [seqlen for seqlen in DEFAULT_EVAL_SEQLENS[1:] if seqlen <= max_positions]
    return data.eval_seqlens or [data.extra_val_seqlen, *default_seqlens]


def load_windows(data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> EvalSets:
    """The evaluation windows used during training, and those used before and after it."""
    seqlens = sorted({*final_seqlens(data, max_positions), data.extra_val_seqlen})
    flags = {data.extra_val_seqlen: "--extra_val_seqlen"}
    return load_eval_sets(split_eval_specs(data.extra_val_set), tokenizer, seqlens, max_positions, data.bos, flags)


def load_data(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, max_positions: int, calibrated: NgramSample
) -> tuple[FinetuneData, EvalSets, EvalSets]:
    """The training data, the evaluation windows used during training, and those used before and after it."""
    data, seqlens = args.data, final_seqlens(args.data, max_positions)
    # Rank 0 tokenises and fills the cache; the other ranks read the cache.
    with args.training.main_process_first(desc="data"):
        windows = load_windows(data, tokenizer, max_positions)
        samples = load_samples(args, tokenizer, windows, calibrated)
    training_windows: EvalSets = {}
    for key, value in windows.items():
        # For a text with and without a BOS, the variant to quote comes first.
        if key.seqlen == data.extra_val_seqlen and key.name not in {other.name for other in training_windows}:
            training_windows[key] = value
    return samples, training_windows, {key: value for key, value in windows.items() if key.seqlen in seqlens}
