"""What a result was made with: the command line, versions and hardware."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers


def command_line() -> str:
    """The command as the user typed it, without its path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Versions, also of further ``packages``, and hardware of this run."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": version("datasets"),
            **{name: version(name) for name in packages},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu_threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }
