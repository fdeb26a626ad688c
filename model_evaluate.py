"""Zero-shot accuracy of a dense, masked, pruned or fused model, measured with lm-eval.

    python model_evaluate.py --model SFT/lora_fused_model --tasks openbookqa,arc_easy,winogrande,piqa \
        --device cuda:0 --batch_size 32 --output_path SFT.json --no_cache
    python model_evaluate.py --model OUT/pruned_weights --data_dir tasks --batch_size auto
    torchrun --nproc_per_node=2 model_evaluate.py --model OUT/pruned_weights --batch_size 32

Prints the results as JSON, then as a table with acc, acc_norm and their averages. Prompts and metrics are those of
lm-eval, also with local files (--data_dir: DIR/TASK/{validation,test}.jsonl in the columns of the hub's data set).

Several processes (torchrun or accelerate launch) each load the model and evaluate a shard of the rows; --parallelize
divides one model among all GPUs instead. Limits: not both; tasks that run generated code are refused.
"""

import argparse
import io
import json
import logging
import time
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ppl_eval.task_warnings import package_log, warn_if_examples_overlap
from ppl_eval.zero_shot import (
    README_TASKS,
    averages,
    check_specials,
    evaluated_split,
    load_tasks,
    match_task_names,
    plain_metrics,
    quieten_progress,
    results_table,
    task_specs,
)
from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.adapters import merged_models
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.bos import BOS_CHOICES, BOS_POLICIES, set_bos
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.common.input_checks import guard_token_ids, set_padding_token
from slim_utils.common.input_paths import check_inputs_outside
from slim_utils.common.loading import (
    DTYPES,
    choose_local_device,
    is_multimodal_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    peak_memory_mib,
)
from slim_utils.common.model_source import check_input, input_format
from slim_utils.layerwise.distributed import ProcessGroup, launched_processes, make_current

logger = logging.getLogger("model_evaluate")

# A CPU gains nothing from larger batches, and raises no out-of-memory error to end a batch size search.
CPU_AUTO_BATCH = 16
# A process may wait until a slower one has evaluated its rows.
COLLECTIVE_TIMEOUT = timedelta(days=7)


def build_parser() -> argparse.ArgumentParser:
    """Parser with all flags of the original script and the later ones."""
    parser = ArgumentParser(prog="model_evaluate.py", description="Zero-shot accuracy of a model, with lm-eval.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--tasks", default=",".join(README_TASKS), help="task names or patterns (default: %(default)s)")
    parser.add_argument("--data_dir", type=Path, help="read task data from DIR/TASK/{train,validation,test}.*")
    parser.add_argument("--num_fewshot", type=int, default=0, help="examples in a prompt (default: %(default)s)")
    parser.add_argument("--bos", choices=BOS_POLICIES, default="auto", help="start prompts with a BOS: " + BOS_CHOICES)
    parser.add_argument("--batch_size", default="1", help="requests per forward, or auto (default: %(default)s)")
    parser.add_argument("--max_batch_size", type=int, default=64, help="upper bound of auto (default: %(default)s)")
    parser.add_argument("--limit", type=float, help="evaluate N rows per task, or a fraction if below 1")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument(
        "--parallelize", action="store_true", help="divide the model among all GPUs, then host memory and disk"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code found in the checkpoint")
    parser.add_argument("--write_out", action="store_true", help="print the first prompts of every task")
    parser.add_argument(
        "--no_cache", action="store_true", help="accepted for compatibility; responses are never cached"
    )
    parser.add_argument("--output_path", type=Path, help="json file for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output_path")
    return parser


def process_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check ``args`` before anything is loaded.

    Raises:
        UserError: naming the flag to change.
    """
    if args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot}: at least 0")
    if args.limit is not None and args.limit <= 0:
        raise UserError(f"--limit {args.limit:g}: above 0")
    if args.max_batch_size < 1:
        raise UserError(f"--max_batch_size {args.max_batch_size}: at least 1")
    args.tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not args.tasks:
        raise UserError("--tasks: give at least one")
    if args.data_dir and not args.data_dir.is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such folder")
    if args.output_path:
        check_output_file(args.output_path, args.overwrite, "--output_path")
        files = args.data_dir.rglob("*") if args.data_dir else ()
        models = merged_models(args.model)
        check_inputs_outside(args.output_path, "--output_path", {"--model": models, "--data_dir": files})
    if args.parallelize and args.device != "auto":
        raise UserError(f"--parallelize uses all GPUs; leave --device {args.device} out, or set CUDA_VISIBLE_DEVICES")
    if args.parallelize and launched_processes() > 1:
        raise UserError("--parallelize: needs one process that uses all GPUs; start it without torchrun or accelerate")
    args.device = choose_local_device(args.device)
    args.batch_size = choose_batch_size(args.batch_size, args.device)
    if args.no_cache:
        logger.info("--no_cache has no effect: responses are never cached")
    return args


def choose_batch_size(text: str, device: torch.device) -> int | str:
    """The batch size of ``--batch_size text``: a number, or ``auto`` for lm-eval's search on a GPU.

    Raises:
        UserError: if ``text`` is neither, or has several processes search several times.
    """
    if text.partition(":")[0] == "auto":
        if text != "auto" and launched_processes() > 1:
            # The searches are collective, and their number differs between processes.
            raise UserError(f"--batch_size {text}: with several processes, auto or a number")
        if device.type != "cpu":
            return text
        logger.info("--batch_size auto: %d on a CPU", CPU_AUTO_BATCH)
        return CPU_AUTO_BATCH
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch_size {text}: must be auto or a number, at least 1")
    return int(text)


def evaluate(args: argparse.Namespace, processes: ProcessGroup, offload_folder: str) -> dict[str, Any] | None:
    """Results of ``simple_evaluate`` and further figures; ``None`` on ranks other than 0. The weights are loaded last.

    Args:
        args: checked flags.
        processes: the process group.
        offload_folder: for weights that do not fit in memory.

    Returns:
        those of ``simple_evaluate``, plus ``splits``, ``bos``, ``truncated`` and ``peak_memory_mib``.
    """
    # Imported after the flags are checked: it takes seconds.
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from ppl_eval.parallel import DataParallelLM, highest_peaks, load_divided_model, prepare_shards
    from ppl_eval.truncation import warn_about_truncation

    config = load_config(args.model, args.trust_remote_code, language_model=True)
    if is_multimodal_checkpoint(args.model):
        logger.info("model %s: its language model, a '%s', is evaluated", args.model, config.model_type)
    check_input(args.model, args.parallelize)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    manager = TaskManager()
    names = match_task_names(manager, args.tasks)
    with ExitStack() as stack:
        specs = stack.enter_context(task_specs(manager, names, args.data_dir))
        loaded = load_tasks(manager, specs, args.data_dir)
    splits = {name: evaluated_split(task) for name, task in loaded["tasks"].items()}
    logger.info("tasks: %s", ", ".join(f"{name} ({split})" for name, split in splits.items()))
    if args.num_fewshot:
        for name, task in loaded["tasks"].items():
            warn_if_examples_overlap(name, task)
    prepare_shards(loaded["tasks"], processes, args.limit, args.num_fewshot)
    check_specials(tokenizer, loaded["tasks"].values(), args.model)
    add_bos = set_bos(tokenizer, args.bos)
    logger.info("prompts start %s a BOS (--bos)", "with" if add_bos else "without")
    if args.parallelize:
        model = load_divided_model(args.model, args.dtype, args.trust_remote_code, offload_folder)
    else:
        model = load_model(args.model, args.dtype, args.trust_remote_code, language_model=True).to(args.device)
    guard_token_ids(model)
    set_padding_token(tokenizer, model.config)
    lm = DataParallelLM(
        model,
        args.device,
        processes,
        tokenizer=tokenizer,
        # With None, the tokenizer's own BOS and EOS settings apply.
        add_bos_token=None if args.bos == "auto" else add_bos,
        batch_size=args.batch_size,
        max_batch_size=args.max_batch_size,
    )
    results = simple_evaluate(
        model=lm,
        tasks=[*loaded["groups"].values(), *ungrouped(loaded)],
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        limit=args.limit,
        write_out=args.write_out,
        log_samples=False,
        task_manager=manager,
    )
    truncated = lm.count_truncated()
    peaks = processes.all_gather(highest_peaks(map(peak_memory_mib, used_devices(args))))
    if results is None:
        return None
    rows = {name: samples["effective"] for name, samples in results["n-samples"].items()}
    warn_about_truncation(truncated, rows, lm.max_length, args.num_fewshot)
    figures = {"splits": splits, "bos": add_bos, "truncated": truncated, "peak_memory_mib": highest_peaks(peaks)}
    return results | figures


def used_devices(args: argparse.Namespace) -> list[torch.device]:
    """Devices of this process."""
    if args.parallelize and args.device.type == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [args.device]


def ungrouped(loaded: dict[str, Any]) -> list[Any]:
    """Tasks requested by name, not as members of a group."""
    group_members = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    return [task for name, task in loaded["tasks"].items() if name not in group_members]


def main(args: argparse.Namespace) -> None:
    """Evaluate; rank 0 prints the results and writes ``--output_path``."""
    args = process_args(args)
    quieten_progress()
    start = time.perf_counter()
    # Only objects are exchanged, on the host.
    processes = ProcessGroup.init(torch.device("cpu"), COLLECTIVE_TIMEOUT)
    if processes.world_size > 1:
        make_current(args.device)
    with ExitStack() as stack:
        level = logging.INFO if args.write_out else logging.WARNING
        stack.enter_context(package_log(logging.ERROR if processes.rank else level))
        if processes.rank:
            stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(processes.shared_errors())
        results = evaluate(args, processes, stack.enter_context(TemporaryDirectory()))
    processes.destroy()
    if results is None:
        return
    metrics = plain_metrics(results["results"])
    counts = {name: samples["effective"] for name, samples in results["n-samples"].items()}
    record = {
        "results": metrics,
        "averages": averages({name: metrics[name] for name in results["splits"]}),
        "versions": results["versions"],
        "samples": counts,
        "splits": results["splits"],
        "truncated": results["truncated"],
        "config": {
            "model": args.model,
            "format": input_format(args.model) or "checkpoint",
            "num_fewshot": args.num_fewshot,
            "bos": results["bos"],
            "batch_size": args.batch_size,
            "limit": args.limit,
            "dtype": args.dtype,
            "device": str(args.device),
            "processes": processes.world_size,
            "parallelize": args.parallelize,
            "data_dir": str(args.data_dir) if args.data_dir else None,
            "seeds": {name: results["config"][name] for name in ("random_seed", "numpy_seed", "torch_seed")},
        },
        "command": command_line(),
        "environment": environment(args.device, "lm-eval"),
        "seconds": round(time.perf_counter() - start, 2),
        # The highest of any process and GPU.
        "peak_memory_mib": results["peak_memory_mib"],
    }
    print(json.dumps(record, indent=2))
    if args.output_path:
        write_json_atomic(args.output_path, record)
    print()
    print(results_table(metrics, counts, record["averages"]))
    if any("acc" not in values for values in metrics.values()):
        from lm_eval.utils import make_table

        print(make_table(results))


if __name__ == "__main__":
    run_cli(
        lambda: main(build_parser().parse_args()),
        "model_evaluate.py",
        memory_advice="lower --batch_size or --max_batch_size, or use --device cpu",
        output_flag="--output_path",
    )
