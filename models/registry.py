"""Registration of the classes of pruned checkpoints, which then load without remote code.

A family's classes are those of its :func:`shipped_code`, the module ``models.modeling_slim_NAME``. It is imported once
a checkpoint of the family is loaded or made; until then, no modeling code of transformers is imported either.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models.families import FAMILIES, Family
from models.shipped_code import shipped_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PREFIX = "models.modeling_"


@dataclass(frozen=True)
class SlimClasses:
    """Classes of a pruned model: its configuration, its model without a head, its causal language model."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal: type[PreTrainedModel]


def slim_classes(family: Family) -> SlimClasses:
    """Return the classes of the pruned models of ``family``, registered with the auto classes of transformers."""
    return _register(family.slim_type)


@cache
def _register(slim_type: str) -> SlimClasses:
    module = importlib.import_module(f"{_PREFIX}{slim_type}")
    name = FAMILIES[slim_type].name
    classes = SlimClasses(*(getattr(module, f"Slim{name}{kind}") for kind in ("Config", "Model", "ForCausalLM")))
    AutoConfig.register(slim_type, classes.config, exist_ok=True)
    AutoModel.register(classes.config, classes.model, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal, exist_ok=True)
    return classes


def _shipped(slim_type: object) -> Family | None:
    """Family whose pruned models have the type ``slim_type``."""
    family = FAMILIES.get(slim_type) if isinstance(slim_type, str) else None
    return family if family and family.slim_type == slim_type else None


class _ShippedCodeFinder(MetaPathFinder):
    """Finder of the modules ``models.modeling_slim_NAME``.

    Their files are written to a temporary folder of this process: transformers copies the file of a class into the
    checkpoint.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Write the code of a family and return where it is; ``None`` for any other module."""
        family = _shipped(fullname.removeprefix(_PREFIX)) if fullname.startswith(_PREFIX) else None
        if family is None:
            return None
        file = _code_folder() / f"modeling_{family.slim_type}.py"
        file.write_text(shipped_code(family), encoding="utf-8")
        return spec_from_file_location(fullname, file)


@cache
def _code_folder() -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="slimgpt-code-")), os.getpid()

    def remove() -> None:
        # Not at the end of a fork of this process.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


class _LazyConfigs(dict[str, Any]):
    """Registered configuration classes by model type; those of pruned models are made when they are asked for.

    Iteration covers the classes that exist.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _shipped(model_type) is not None

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        if _shipped(model_type) is None:
            raise KeyError(model_type)
        return _register(model_type).config


def install() -> None:
    """Make the modules importable, and their model types known to ``AutoConfig``."""
    sys.meta_path.append(_ShippedCodeFinder())
    CONFIG_MAPPING._extra_content = _LazyConfigs(CONFIG_MAPPING._extra_content)
