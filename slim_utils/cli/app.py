"""What every entry script shares: one-line errors, exit codes, signals and logging."""

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

from slim_utils.common.errors import ProcessLostError, UserError, is_disk_full


class ArgumentParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` whose errors are one line on stderr (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def setup_logging() -> None:
    """Send one line a message to stderr, fit for ``tee``, and silence progress bars where no one watches them."""
    # Of several processes the first one speaks for all.
    level = logging.ERROR if _rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # The libraries' warnings about each other's spellings are not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not torch.accelerator.is_available():
        # Where DeepSpeed is installed, it warns of this as soon as accelerate looks at it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        # The package reads it when it is imported, which takes a second and is put off.
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
    """Run ``main`` and leave the process with one clear line instead of a traceback.

    Args:
        main: the script.
        prog: its name.
        memory_advice: what to do where the GPU's memory is full.
        output_flag: what chooses where it writes.
        resume_advice: what to do after an interruption, or a full disk with room made.

    Exit codes: 0 done, 1 the machine gave out (disk full, memory), 2 wrong input, 130 Ctrl-C, 143 terminated.
    SIGTERM is raised as ``SystemExit`` so that temporary folders are removed on the way out.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    setup_logging()
    try:
        main()
    except UserError as error:
        if _rank():
            # Raised in all processes alike.
            sys.exit(2)
        _fail(prog, str(error) + _notes(error), 2)
    except ProcessLostError as error:
        _fail(prog, f"rank {_rank()}: {error}{resume_advice}", 1)
    except KeyboardInterrupt as error:
        _fail(prog, f"interrupted; nothing half-written is left behind{_notes(error) or resume_advice}", 130)
    except torch.OutOfMemoryError as error:
        _fail(prog, f"the GPU's memory is full{_notes(error) or f'; {memory_advice}{resume_advice}'}", 1)
    except Exception as error:
        if not is_disk_full(error):
            raise
        saved = _notes(error)
        message = f"the disk is full{'' if saved else ', nothing was saved'} ({error}); free space"
        _fail(prog, message + (saved or f" or choose another {output_flag}{resume_advice}"), 1)
    sys.exit(0)


def _notes(error: BaseException) -> str:
    """What holds in spite of ``error``, for the end of a message."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _rank() -> int:
    """Of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
