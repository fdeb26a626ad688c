"""Shared by all entry scripts: one-line errors, exit codes, signals and logging."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
import transformers

from slim_utils.common.errors import ProcessLostError, RankError, UserError, is_disk_full, is_gpu_full


class ArgumentParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` with one-line errors on stderr (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def setup_logging() -> None:
    """Log one line per message to stderr, and disable progress bars unless rank 0 has a terminal as stderr."""
    # Only rank 0 logs below ERROR.
    level = logging.ERROR if _rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # FutureWarnings that the libraries raise about each other are not actionable for the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not torch.accelerator.is_available():
        # An installed DeepSpeed warns about a missing accelerator when accelerate imports it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if _rank():
        transformers.utils.logging.set_verbosity_error()
    if _rank() or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        # Read when datasets is imported, which is deferred because it takes a second.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()


def run_cli(
    main: Callable[[], None],
    prog: str,
    memory_advice: str = "use --device cpu",
    output_flag: str = "--out",
    resume_advice: str = "",
) -> NoReturn:
    """Run ``main`` and exit; expected errors print one line instead of a traceback.

    Args:
        main: the script.
        prog: its name.
        memory_advice: what to change when the GPU is out of memory.
        output_flag: flag of the output path.
        resume_advice: how to continue after an interruption, or after space on a full disk was freed.

    Exit codes: 0 success, 1 out of disk or memory or a lost process, 2 wrong input, 130 Ctrl-C, 143 terminated.
    SIGTERM is raised as ``SystemExit`` so that temporary folders are removed.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    setup_logging()
    try:
        main()
    except UserError as error:
        if _rank() and not isinstance(error, RankError):
            # All ranks raise the same error; rank 0 prints it.
            sys.exit(2)
        _fail(prog, (f"rank {_rank()}: " if _rank() else "") + str(error) + _notes(error), 2)
    except ProcessLostError as error:
        _fail(prog, f"rank {_rank()}: {error}{resume_advice}", 1)
    except KeyboardInterrupt as error:
        _fail(prog, f"interrupted; no partially written file is left{_notes(error) or resume_advice}", 130)
    except Exception as error:
        advice = _notes(error) or f"; {memory_advice}{resume_advice}"
        if is_gpu_full(error):
            _fail(prog, f"out of GPU memory ({str(error).splitlines()[0]}){advice}", 1)
        if isinstance(error, torch.OutOfMemoryError):
            _fail(prog, f"out of GPU memory{advice}", 1)
        if not is_disk_full(error):
            raise
        notes = _notes(error)
        message = f"the disk is full{'' if notes else ', nothing was saved'} ({error}); free space"
        _fail(prog, message + (notes or f" or choose another {output_flag}{resume_advice}"), 1)
    sys.exit(0)


def _notes(error: BaseException) -> str:
    """Notes of ``error`` as the end of a message, e.g. what is already saved."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _rank() -> int:
    """Rank of this process, as set by torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
