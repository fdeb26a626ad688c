"""The folder that a fine-tuning run trains in: its output folder or, while that holds an earlier result, a subfolder.

Files of an earlier run stay until the new result is complete. Checkpoints of two runs never share a folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from slim_utils.common.atomic_output import check_output, write_json_atomic
from slim_utils.common.errors import UserError
from slim_utils.common.input_paths import is_inside
from slim_utils.common.output_folder import (
    RUN_FILE,
    clear_leftovers,
    finish_replacement,
    output_entries,
    replace_entries,
)

TRAINER_STATE = "trainer_state.json"
UNFINISHED_FOLDER = ".unfinished"


def choose_run_folder(output_dir: Path, overwrite: bool, resume: str | None) -> tuple[Path, str | None]:
    """The folder to train in, and the checkpoint to resume from, if any.

    Writes nothing, except that an interrupted replacement of the output is completed or rolled back.

    Args:
        output_dir: ``--output_dir``.
        overwrite: ``--overwrite``.
        resume: ``--resume_from_checkpoint``: ``true``, ``false``, or a checkpoint of this output or of another run.

    Raises:
        UserError: if the output may not be written, or there is no complete checkpoint.
    """
    unfinished = output_dir / UNFINISHED_FOLDER
    finish_replacement(unfinished, output_dir)
    resume = None if resume is None or resume.lower() == "false" else resume
    if resume is not None and resume.lower() == "true":
        folder = unfinished if unfinished.is_dir() and any(unfinished.iterdir()) else output_dir
        return folder, last_complete_checkpoint(folder)
    if resume is not None:
        if not (Path(resume) / TRAINER_STATE).is_file():
            raise UserError(f"--resume_from_checkpoint {resume}: not a checkpoint (no {TRAINER_STATE})")
        for folder in (unfinished, output_dir):
            if Path(resume).resolve().parent == folder.resolve() and (folder / RUN_FILE).is_file():
                return folder, resume
        if is_inside(Path(resume), output_dir):
            raise UserError(
                f"--resume_from_checkpoint {resume}: inside --output_dir {output_dir}, but not of its run; "
                "choose another --output_dir"
            )
    if not overwrite and not _is_finished(output_dir / RUN_FILE) and _complete_checkpoints(output_dir):
        raise UserError(
            f"--output_dir {output_dir}: a run was interrupted; --resume_from_checkpoint true continues it, "
            "--overwrite true starts anew"
        )
    check_output(output_dir, overwrite, "--output_dir")
    return (unfinished if output_dir.is_dir() and output_entries(output_dir) else output_dir), resume


def last_complete_checkpoint(output_dir: Path) -> str:
    """The newest complete checkpoint, i.e. with ``trainer_state.json``, which the Trainer writes last.

    Raises:
        UserError: if no checkpoint is complete.
    """
    steps = _complete_checkpoints(output_dir)
    if not steps:
        raise UserError(f"--resume_from_checkpoint true: no complete checkpoint in {output_dir}; leave it out")
    return str(steps[max(steps)])


def _complete_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The complete checkpoints by step."""
    complete = [path.parent for path in output_dir.glob(f"checkpoint-*/{TRAINER_STATE}")]
    return {int(path.name.rpartition("-")[2]): path for path in complete if path.name.rpartition("-")[2].isdigit()}


def open_run_folder(folder: Path, record: dict[str, Any], resumes: bool) -> None:
    """Create the folder to train in and write its unfinished ``run.json``.

    Args:
        folder: result of :func:`choose_run_folder`.
        record: content of ``run.json``.
        resumes: whether a run is resumed; the record of a finished run then stays until the new result is complete.
    """
    if folder.name == UNFINISHED_FOLDER and not resumes:
        shutil.rmtree(folder, ignore_errors=True)
        clear_leftovers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (resumes and _is_finished(folder / RUN_FILE)):
        write_json_atomic(folder / RUN_FILE, record)


def _is_finished(run_file: Path) -> bool:
    try:
        return json.loads(run_file.read_text(encoding="utf-8")).get("finished") is True
    except (OSError, ValueError):
        return False


def install_result(folder: Path, output_dir: Path) -> None:
    """Move the finished run in ``folder`` to ``output_dir``, replacing an earlier run; ``run.json`` comes last."""
    if folder == output_dir:
        shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)
        return
    for state in folder.glob(f"**/{TRAINER_STATE}"):
        _move_best_checkpoint(state, folder, output_dir)
    replace_entries(folder, output_dir, [entry for entry in output_entries(output_dir) if entry != folder])
    folder.rmdir()


def _move_best_checkpoint(state: Path, folder: Path, output_dir: Path) -> None:
    """Rewrite the path of the best checkpoint in a ``trainer_state.json`` from ``folder`` to ``output_dir``."""
    content = json.loads(state.read_text(encoding="utf-8"))
    best = content.get("best_model_checkpoint")
    if best and Path(best).parent == folder:
        write_json_atomic(state, content | {"best_model_checkpoint": str(output_dir / Path(best).name)})
