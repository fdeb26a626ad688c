"""Registration of the classes of pruned checkpoints, which then load without remote code.

A family's classes are those of its :func:`shipped_code`, the module ``models.modeling_slim_NAME``. It is imported once
a checkpoint of the family is loaded or made; until then, no modeling code of transformers is imported either.
"""

from __future__ import annotations

import hashlib
import importlib
import os
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
from transformers.utils.hub import HF_MODULES_CACHE

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

    They are files in the cache of transformers for modules, which copies the file of a class into the checkpoint.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Write the code of a family and return where it is; ``None`` for any other module."""
        family = _shipped(fullname.removeprefix(_PREFIX)) if fullname.startswith(_PREFIX) else None
        if family is None:
            return None
        return spec_from_file_location(fullname, _code_file(f"modeling_{family.slim_type}.py", shipped_code(family)))


def _code_file(name: str, code: str) -> Path:
    """File ``name`` with this content; in a temporary folder if the cache cannot be written."""
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    file = Path(HF_MODULES_CACHE) / "slimgpt" / digest / name
    if file.is_file() and file.read_text(encoding="utf-8") == code:
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may write the same file.
        partial = file.with_name(f"{name}.{os.getpid()}")
        partial.write_text(code, encoding="utf-8")
        partial.replace(file)
    except OSError:
        file = Path(tempfile.mkdtemp(prefix="slimgpt-code-")) / name
        file.write_text(code, encoding="utf-8")
    return file


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
