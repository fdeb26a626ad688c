"""Write an HTML report with figures of pruning runs and benchmark results.

    python -m scripts.report OUT OTHER benchmarks/results/bench_quality.json --out report

Each RUN is a --save_dir of model_slimming.py, its run.json, or a json written by a script of benchmarks/, by
test_flops.py --compare or by scripts/compare_models.py. Writes report/index.html, a self-contained page, its figures
as PNG files, and report/run.json. The page shows kept heads and widths, errors and sensitivities by layer, perplexity
against size, speed and memory, and the numbers behind them with commands, versions and hardware.
"""

import argparse
import hashlib
import io
import logging
import sys
from itertools import count
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slim_utils.cli.app import ArgumentParser, run_cli
from slim_utils.common.atomic_output import atomic_folder, check_output, write_json_atomic, write_text_atomic
from slim_utils.common.environment import command_line, environment
from slim_utils.common.input_paths import check_inputs_outside
from slim_utils.common.output_folder import RUN_FILE
from slim_utils.report.contents import plots
from slim_utils.report.page import Picture, page
from slim_utils.report.plot import Plot
from slim_utils.report.sources import raw_rows, read_sources

logger = logging.getLogger("report")

PAGE = "index.html"
# CSS pixels per inch of a figure.
PAGE_DPI = 96


def build_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = ArgumentParser(prog="report.py", description="HTML report of pruning runs and benchmarks.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a pruning run, run.json, or json of a benchmark"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    return parser


def picture(plot: Plot) -> Picture:
    """Draw ``plot`` as a PNG."""
    figure: Figure = plot.draw()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = (round(PAGE_DPI * inches) for inches in figure.get_size_inches())
    return Picture(plot, buffer.getvalue(), width, height)


def file_names(pictures: list[Picture]) -> list[str]:
    """Distinct file names of the pictures; duplicates are numbered."""
    names: list[str] = []
    for item in pictures:
        stem = f"{item.plot.section}_{item.plot.name}"
        candidates = (f"{stem}.png" if number == 1 else f"{stem}_{number}.png" for number in count(1))
        names.append(next(name for name in candidates if name not in names))
    return names


def main(args: argparse.Namespace) -> None:
    """Read the sources, draw the figures, and write the report atomically."""
    check_output(args.out, args.overwrite, "--out", (RUN_FILE, PAGE))
    check_inputs_outside(args.out, "--out", {"RUN": args.runs})
    sources = read_sources(args.runs)
    numbers = [(source, raw_rows(source)) for source in sources]
    pictures = [picture(plot) for plot in plots(sources)]
    record = {
        "command": command_line(),
        **environment(torch.device("cpu"), "matplotlib"),
        "sources": {str(source.path): hashlib.sha256(source.path.read_bytes()).hexdigest() for source in sources},
    }
    made_by = f"{record['command']} · matplotlib {record['versions']['matplotlib']}"
    with atomic_folder(args.out) as folder:
        for name, item in zip(file_names(pictures), pictures, strict=True):
            (folder / name).write_bytes(item.png)
        write_text_atomic(folder / PAGE, page(pictures, numbers, made_by))
        write_json_atomic(folder / RUN_FILE, record)
    logger.info("saved %s: %d figures of %d sources", args.out / PAGE, len(pictures), len(sources))


if __name__ == "__main__":
    run_cli(lambda: main(build_parser().parse_args()), "report.py")
