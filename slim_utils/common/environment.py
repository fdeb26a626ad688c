"""Record of how a result was produced: command line, versions, commit and hardware."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from slim_utils import __version__

_ROOT = Path(__file__).resolve().parents[2]


def command_line() -> str:
    """The command line of this process, with the script's file name instead of its path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@cache
def commit() -> str:
    """Short hash of the suite's commit, with ``-dirty`` for local changes; ``unknown`` outside a checkout."""
    # An installed suite may be inside the checkout of another project.
    if not (_ROOT / ".git").exists():
        return "unknown"
    describe = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Versions (including those of ``packages``), the suite's commit, and the hardware of this run."""
    return {
        "versions": {
            "slimgpt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": version("datasets"),
            **{name: version(name) for name in packages},
        },
        "commit": commit(),
        "hardware": {
            "machine": platform.machine(),
            "cpu_threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }
