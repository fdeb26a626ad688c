"""Zero-shot tasks of lm-eval: task names, local data, and the table of results."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from slim_utils.common.errors import UserError, error_reason
from slim_utils.profiling.tables import text_table
from slim_utils.text_source import cache_advice

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

README_TASKS = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq")
# Papers on pruned LLaMAs (LLM-Pruner and later) average acc_norm of these tasks and acc of the others.
ACC_NORM_IN_PAPERS = ("openbookqa", "hellaswag", "arc_challenge")
SPLIT_KEYS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


class _TerminalTqdm(tqdm):
    """Progress bar that is disabled if stderr is not a terminal, even if lm-eval enables it."""

    def __init__(self, *args: Any, disable: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, disable=disable or None, **kwargs)


def quieten_progress() -> None:
    """Disable the progress bars of lm-eval if stderr is not a terminal."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        module.tqdm = _TerminalTqdm


def match_task_names(manager: TaskManager, names: list[str]) -> list[str]:
    """Tasks, groups and tags that match ``names``, which may contain ``*``.

    Raises:
        UserError: for a name without a match, with the nearest names.
    """
    matched = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise UserError(f"--tasks {name}: no such task{hint}")
        matched += matches
    return list(dict.fromkeys(matched))


@contextmanager
def task_specs(manager: TaskManager, names: list[str], data_dir: Path | None) -> Iterator[list[str]]:
    """Task arguments for lm-eval: ``names``, or definition files whose data are in ``data_dir``.

    A definition file includes lm-eval's own definition of the task and only overrides the source of its rows, so
    prompts and metrics are those of lm-eval.

    Raises:
        UserError: if files of a task are missing in ``data_dir``.
    """
    if data_dir is None:
        yield names
        return
    with TemporaryDirectory() as folder:
        specs = []
        for name in names:
            definition = local_definition(manager, name, data_dir, Path(folder))
            path = Path(folder) / f"{name}.yaml"
            path.write_text(yaml.safe_dump(definition), encoding="utf-8")
            specs.append(str(path))
        yield specs


def local_definition(manager: TaskManager, name: str, data_dir: Path, scratch: Path) -> dict[str, Any]:
    """Definition of the task ``name`` with the data files ``data_dir/name/{train,validation,test}.*``.

    The files are linked from ``scratch``, which also holds their cache: the file reader interprets some characters of a
    path as patterns, and the user's cache may not be writable. Loaded data are kept in memory and outlive ``scratch``.

    Raises:
        UserError: if the files are missing or of different formats, or ``name`` is a group of tasks.
    """
    source = manager.task_index[name].yaml_path
    if name not in manager.all_subtasks or source is None:
        raise UserError(f"--tasks {name}: is a group; with --data_dir, give the names of its tasks")
    files = {
        split: path
        for split in SPLIT_KEYS
        for suffix in _BUILDERS
        if (path := data_dir / name / f"{split}{suffix}").is_file()
    }
    if not files.keys() & {"validation", "test"}:
        raise UserError(
            f"--data_dir {data_dir}: no {name}/validation or {name}/test as {', '.join(_BUILDERS)}; leave {name} out "
            "of --tasks, or leave --data_dir out to read the hub"
        )
    builders = {_BUILDERS["".join(path.suffixes)] for path in files.values()}
    if len(builders) > 1:
        raise UserError(f"--data_dir {data_dir}: the files of {name} have different formats; use a single format")
    links = {split: scratch / f"{name}-{split}{''.join(path.suffixes)}" for split, path in files.items()}
    for split, link in links.items():
        link.symlink_to(files[split].absolute())
    definition = {
        "include": str(source),
        "task": name,
        "dataset_path": builders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(link) for split, link in links.items()},
            "cache_dir": str(scratch / "cache"),
            "keep_in_memory": True,
        },
    }
    # Splits without a file are unset, so that lm-eval does not request them.
    missing = {key: None for split, key in SPLIT_KEYS.items() if split not in files}
    return definition | missing


def load_tasks(manager: TaskManager, specs: list[str], data_dir: Path | None) -> dict[str, Any]:
    """lm-eval's task objects for ``specs``.

    Raises:
        UserError: if the data of a task cannot be read.
    """
    try:
        return manager.load(specs)
    except Exception as error:
        # Hub clients, file readers and templates all raise their own exception classes.
        advice = "check the columns of its files" if data_dir else "pass local files with --data_dir DIR"
        problem = (None if data_dir else cache_advice(error)) or f"{error_reason(error)}; {advice}"
        raise UserError(f"the data of {', '.join(Path(spec).stem for spec in specs)}: {problem}") from error


def check_specials(tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Any], model_path: str) -> None:
    """Check that the tokenizer of ``model_path`` has the special tokens that lm-eval needs for ``tasks``.

    Raises:
        UserError: if no token is available to end an answer, to prefix an empty context, or to pad.
    """
    if tokenizer.eos_token is not None:
        return
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks)
    pads = tokenizer.pad_token is not None or tokenizer.unk_token is not None
    if generates or tokenizer.bos_token is None or not pads:
        raise UserError(
            f"--model {model_path}: the tokenizer has no end-of-sequence token, which lm-eval needs here; set "
            "eos_token in its tokenizer_config.json"
        )


def evaluated_split(task: Any) -> str:
    """Name of the split that ``task`` is evaluated on."""
    return "test" if task.has_test_docs() else "validation"


def plain_metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by task and plain name (``acc``, ``acc_stderr``, …), without lm-eval's filter names."""
    return {
        name: {
            metric.partition(",")[0]: value
            for metric, value in values.items()
            if isinstance(value, (int, float)) and "," in metric
        }
        for name, values in results.items()
    }


def averages(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over the tasks that have an ``acc``.

    Returns:
        ``acc``; ``acc_norm``, or acc for tasks without it; ``papers``: acc_norm for ``ACC_NORM_IN_PAPERS``, else acc.
    """
    scored = {name: values for name, values in metrics.items() if "acc" in values}
    if not scored:
        return {}
    normed = {name: values.get("acc_norm", values["acc"]) for name, values in scored.items()}
    papers = [normed[name] if name in ACC_NORM_IN_PAPERS else values["acc"] for name, values in scored.items()]
    return {
        "acc": sum(values["acc"] for values in scored.values()) / len(scored),
        "acc_norm": sum(normed.values()) / len(scored),
        "papers": sum(papers) / len(scored),
    }


def results_table(metrics: dict[str, dict[str, float]], counts: dict[str, int], means: dict[str, float]) -> str:
    """Text table of ``acc`` and ``acc_norm`` with standard errors, in percent, one row per task, and their ``means``.

    A star marks the metric that papers average.
    """
    rows = []
    for name, values in metrics.items():
        starred = "acc_norm" if name in ACC_NORM_IN_PAPERS else "acc"
        row = [name, str(counts.get(name, 0))]
        for metric in ("acc", "acc_norm"):
            star = "*" if metric == starred else ""
            row.append(f"{100 * values[metric]:.2f}{star}" if metric in values else "-")
            row.append(f"{100 * values[f'{metric}_stderr']:.2f}" if _is_number(values.get(f"{metric}_stderr")) else "-")
        rows.append(row)
    if means:
        rows.append(["average", "", f"{100 * means['acc']:.2f}", "", f"{100 * means['acc_norm']:.2f}"])
        rows.append(["average of *", "", f"{100 * means['papers']:.2f}"])
    return text_table(("task", "samples", "acc", "stderr", "acc_norm", "stderr"), rows, widths=(20,))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
