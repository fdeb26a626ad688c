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

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import HF_MODULES_CACHE

from models.families import FAMILIES
from models.family import Family
from models.shipped_code import shipped_code, shipped_wrapper_code
from models.wrappers import WRAPPER_ROWS, Wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PREFIX = "models.modeling_"


@dataclass(frozen=True)
class SlimClasses:
    """Classes of a pruned model: its configuration, its model without a head, its causal language model."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal: type[PreTrainedModel]


@dataclass(frozen=True)
class SlimWrapperClasses:
    """Classes of a pruned multimodal model: its configuration, that of its language model, the model."""

    config: type[PreTrainedConfig]
    text_config: type[PreTrainedConfig]
    model: type[PreTrainedModel]


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


@cache
def slim_wrapper_classes(wrapper: Wrapper) -> SlimWrapperClasses:
    """Return the classes of the pruned models of ``wrapper``, registered with the auto classes of transformers."""
    module = importlib.import_module(f"{_PREFIX}{wrapper.slim_type}")
    names = f"{wrapper.name}Config", f"{wrapper.family.name}TextConfig", f"{wrapper.name}ForConditionalGeneration"
    classes = SlimWrapperClasses(*(getattr(module, f"Slim{name}") for name in names))
    AutoConfig.register(wrapper.slim_type, classes.config, exist_ok=True)
    AutoModelForImageTextToText.register(classes.config, classes.model, exist_ok=True)
    return classes


def _shipped(slim_type: object) -> Family | Wrapper | None:
    """Row whose pruned models have the type ``slim_type``."""
    family = FAMILIES.get(slim_type) if isinstance(slim_type, str) else None
    if family and family.slim_type == slim_type:
        return family
    return next((wrapper for wrapper in WRAPPER_ROWS if wrapper.slim_type == slim_type), None)


class _ShippedCodeFinder(MetaPathFinder):
    """Finder of the modules ``models.modeling_slim_NAME``.

    They are files in the cache of transformers for modules, which copies the file of a class into the checkpoint.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Write the code of a family and return where it is; ``None`` for any other module."""
        row = _shipped(fullname.removeprefix(_PREFIX)) if fullname.startswith(_PREFIX) else None
        if row is None:
            return None
        code = shipped_wrapper_code(row) if isinstance(row, Wrapper) else shipped_code(row)
        return spec_from_file_location(fullname, _code_file(f"modeling_{row.slim_type}.py", code))


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
        row = _shipped(model_type)
        if row is None:
            raise KeyError(model_type)
        return slim_wrapper_classes(row).config if isinstance(row, Wrapper) else _register(model_type).config


def install() -> None:
    """Make the modules importable, and their model types known to ``AutoConfig``."""
    sys.meta_path.append(_ShippedCodeFinder())
    CONFIG_MAPPING._extra_content = _LazyConfigs(CONFIG_MAPPING._extra_content)
