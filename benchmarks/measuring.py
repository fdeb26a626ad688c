"""Shared by the benchmarks: evaluation windows of named files, resumable rows, rows measured in new processes."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppl_eval.ppl_dataset import eval_windows
from slim_utils.common.atomic_output import check_output_file, write_json_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.errors import UserError
from slim_utils.layerwise.offload import CPU
from slim_utils.text_source import file_documents, join_documents, tokenize

Row = dict[str, Any]


def named_files(flag: str, specs: Iterable[str]) -> dict[str, Path]:
    """Files by name, from ``specs`` ``NAME=FILE`` of ``flag``.

    Raises:
        UserError: naming the flag and the invalid spec.
    """
    files = {}
    for spec in specs:
        name, separator, file = spec.partition("=")
        if not separator or not Path(file).is_file():
            raise UserError(f"{flag} {spec}: give NAME=FILE of an existing file")
        files[name] = Path(file)
    return files


def file_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> Tensor:
    """Token ids (n,) of the text of a file, without special tokens."""
    return tokenize(tokenizer, join_documents(file_documents(file)), add_special_tokens=False)


def eval_sets(
    tokenizer: PreTrainedTokenizerBase, specs: Iterable[str], count: int, seqlen: int, bos: int | None = None
) -> dict[str, Tensor]:
    """The first windows (count, seqlen) of every text of ``--eval_files``, by name; each starts with ``bos``, if given.

    Raises:
        UserError: if a file is missing or shorter than one window.
    """
    return {
        name: eval_windows(file_tokens(tokenizer, file), seqlen, str(file), bos)[:count]
        for name, file in named_files("--eval_files", specs).items()
    }


def measure_missing_rows(
    out: Path,
    protocol: dict[str, Any],
    names: tuple[str, ...],
    keys: Iterable[tuple],
    measure: Callable[..., Row],
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Measure the rows that are missing in ``out``, and write each as soon as it is measured.

    Args:
        out: result file, possibly of an interrupted run.
        protocol: settings common to all rows.
        names: names of the entries that identify a row.
        keys: values of these entries, for every row of the benchmark.
        measure: measures the row of a key.
        device: where it does.

    Returns:
        The content of ``out``.

    Raises:
        UserError: if ``out`` has another protocol, or its folder does not exist.
    """
    rows = existing_rows(out, protocol)
    record = {"command": command_line(), **environment(device), "protocol": protocol, "rows": rows}
    measured = {tuple(row.get(name) for name in names) for row in record["rows"]}
    for key in keys:
        if key not in measured:
            record["rows"].append(measure(*key))
            write_json_atomic(out, record)
    return record


def existing_rows(out: Path, protocol: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run with the same protocol.

    Raises:
        UserError: if ``out`` has another protocol, or its folder does not exist.
    """
    if not out.exists():
        check_output_file(out, False, "--out")
        return []
    record = json.loads(out.read_text(encoding="utf-8"))
    if record["protocol"] != protocol:
        raise UserError(f"--out {out}: has another protocol, {record['protocol']}; choose another file")
    return record["rows"]


def measure_in_new_process(script: str, argv: Iterable[object], name: str) -> Row:
    """One row, measured by ``script`` in a new process, so that its peak memory is that of the row.

    Args:
        script: benchmark script that writes the row to ``--out``.
        argv: its arguments, without ``--out``.
        name: name of the row in the error message.

    Raises:
        UserError: if the process fails; the process has printed the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, script, *map(str, argv), "--out", str(out)]
        if subprocess.run(command, check=False).returncode != 0:
            raise UserError(f"{name} could not be measured")
        return json.loads(out.read_text(encoding="utf-8"))
