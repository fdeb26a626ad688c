"""Configuration of a pruning run: one field per flag of ``model_slimming.py``."""

from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch

SENSITIVITY = "search"
# Units of mixtures of experts: the same number of columns of every expert, or whole experts.
EXPERT_UNITS = ("columns", "expert")
TARGET_FLAGS = ("--target_ratio", "--target_params", "--target_macs", "--target_memory", "--target_latency")
# Tokens of the forward whose multiply-accumulates are counted.
MACS_TOKENS = 64
# KV cache of --target_memory, prompts of --target_latency.
DEFAULT_BATCH, DEFAULT_CONTEXT, DEFAULT_PROMPT = 1, 4096, 128
DEFAULT_WORKLOAD = "generation"
# Timed generations of each model.
DEFAULT_LATENCY_REPEATS = 5
# Enough first tokens that nearly every token still forms an attention sink at position 0.
BEST_SINK_WINDOWS = 512
# Smaller groups do not reduce the error (benchmarks/layer_choices.py) and take longer on wide layers.
BEST_COLUMN_GROUP = 32


class Effect(Enum):
    """Effect of a flag on the weights, and with it what ``--resume`` allows to change.

    ``VALUE``: the value matters; it may not change. ``CONTENT``: the content matters, not its location; a file may
    move. ``ROUNDING``: rounding errors; the value may change, with a warning. ``NONE``: the value may change.
    """

    VALUE, CONTENT, ROUNDING, NONE = "value", "content", "rounding", "none"


_VALUE, _CONTENT, _ROUNDING, _NONE = ({"effect": effect} for effect in Effect)


@dataclass(frozen=True)
class PruningConfig:
    """Flags of a pruning run by name, with their defaults; ``--help`` describes them.

    ``device`` and ``cache_dev`` are names; ``auto`` is resolved when the flags are checked.
    """

    model_path: str = field(default="", metadata=_CONTENT)
    dataset: str | None = field(default=None, metadata=_CONTENT)
    data_file: list[str] | None = field(default=None, metadata=_CONTENT)
    num_samples: int = field(default=1024, metadata=_VALUE)
    seqlen: int = field(default=2048, metadata=_VALUE)
    seed: int = field(default=0, metadata=_VALUE)
    bos: str = field(default="auto", metadata=_VALUE)
    sparsity: float = field(default=0, metadata=_VALUE)
    non_uniform: bool = field(default=False, metadata=_VALUE)
    non_uniform_strategy: str = field(default="log_increase", metadata=_VALUE)
    min_sparsity: float = field(default=0, metadata=_VALUE)
    max_sparsity: float = field(default=0, metadata=_VALUE)
    target_ratio: float | None = field(default=None, metadata=_VALUE)
    target_params: float | None = field(default=None, metadata=_VALUE)
    target_macs: str | None = field(default=None, metadata=_VALUE)
    target_memory: str | None = field(default=None, metadata=_VALUE)
    target_latency: str | None = field(default=None, metadata=_VALUE)
    latency_of: str | None = field(default=None, metadata=_VALUE)
    latency_file: Path | None = field(default=None, metadata=_CONTENT)
    at_context: int | None = field(default=None, metadata=_VALUE)
    at_batch: int | None = field(default=None, metadata=_VALUE)
    allocation: str | None = field(default=None, metadata=_VALUE)
    refine: int = field(default=0, metadata=_VALUE)
    # A resumed run keeps the losses measured so far.
    search_minutes: float | None = field(default=None, metadata=_NONE)
    profile: Path | None = field(default=None, metadata=_CONTENT)
    gqa_unit: str = field(default="query_head", metadata=_VALUE)
    expert_unit: str | None = field(default=None, metadata=_VALUE)
    multiple_of: int = field(default=1, metadata=_VALUE)
    even_heads: bool = field(default=False, metadata=_VALUE)
    tp_size: int = field(default=1, metadata=_VALUE)
    minlayer: int = field(default=-1, metadata=_VALUE)
    maxlayer: int = field(default=1000, metadata=_VALUE)
    no_compensate: bool = field(default=False, metadata=_VALUE)
    percdamp: float = field(default=0.01, metadata=_VALUE)
    exact_heads: bool = field(default=False, metadata=_VALUE)
    column_group: int | None = field(default=None, metadata=_VALUE)
    sink_windows: int | None = field(default=None, metadata=_VALUE)
    # Sets other flags, whose values are compared.
    preset: str = field(default="paper", metadata=_NONE)
    # The type of device is compared; another GPU is a warning.
    device: str = field(default="auto", metadata=_CONTENT)
    cache_dev: str | None = field(default=None, metadata=_NONE)
    batch_samples: int = field(default=128, metadata=_ROUNDING)
    tokens_per_forward: int | None = field(default=None, metadata=_ROUNDING)
    solve_dtype: str = field(default="auto", metadata=_ROUNDING)
    keep_activations: float | None = field(default=None, metadata=_NONE)
    stream: bool = field(default=False, metadata=_VALUE)
    dtype: str = field(default="auto", metadata=_VALUE)
    family_like: str | None = field(default=None, metadata=_VALUE)
    text_only: bool = field(default=False, metadata=_VALUE)
    trust_remote_code: bool = field(default=False, metadata=_NONE)
    save_dir: str = field(default="", metadata=_NONE)
    save_pruned_weights: bool = field(default=False, metadata=_NONE)
    uniform_shapes: bool = field(default=False, metadata=_VALUE)
    overwrite: bool = field(default=False, metadata=_NONE)
    resume: bool = field(default=False, metadata=_NONE)
    push_to_hub: str | None = field(default=None, metadata=_NONE)
    hub_public: bool = field(default=False, metadata=_NONE)
    skip_evaluate: bool = field(default=False, metadata=_NONE)
    eval_datasets: list[str] = field(default_factory=lambda: ["wikitext2"], metadata=_NONE)
    eval_seqlens: list[int] | None = field(default=None, metadata=_NONE)

    def flags(self, effect: Effect) -> dict[str, Any]:
        """Return the values of the flags of one effect, by flag."""
        return {
            f"--{flag.name}": getattr(self, flag.name) for flag in fields(self) if flag.metadata["effect"] == effect
        }

    def to_json(self) -> dict[str, Any]:
        """Return the values by name, paths and devices as text."""
        return {
            name: value if isinstance(value, (int, float, list, type(None))) else str(value)
            for name, value in asdict(self).items()
        }

    @property
    def torch_device(self) -> torch.device:
        """Device that layers run on, once ``auto`` is resolved."""
        return torch.device(self.device)

    @property
    def torch_cache_dev(self) -> torch.device:
        """Device of the activations between layers."""
        return torch.device(self.cache_dev or self.device)

    @property
    def whole_experts(self) -> bool:
        """Whether mixtures of experts lose whole experts."""
        return self.expert_unit == "expert"

    @property
    def has_target(self) -> bool:
        """Whether an overall target is set."""
        return any(getattr(self, flag.removeprefix("--")) is not None for flag in TARGET_FLAGS)

    @property
    def cache_size(self) -> tuple[int, int]:
        """Sequences, and tokens of each, in the KV cache that ``--target_memory`` counts."""
        return self.at_batch or DEFAULT_BATCH, self.at_context or DEFAULT_CONTEXT

    @property
    def request_size(self) -> tuple[int, int]:
        """Prompts of a batch, and tokens of each, that ``--target_latency`` is measured with."""
        return self.at_batch or DEFAULT_BATCH, self.at_context or DEFAULT_PROMPT

    @property
    def latency_workload(self) -> str:
        """Workload that ``--target_latency`` counts."""
        return self.latency_of or DEFAULT_WORKLOAD

    @property
    def target_size(self) -> tuple[str, str] | None:
        """Flag and value of a target in multiply-accumulates, bytes or milliseconds."""
        sizes = {flag: getattr(self, flag.removeprefix("--")) for flag in TARGET_FLAGS[2:]}
        return next(((flag, value) for flag, value in sizes.items() if value is not None), None)

    @property
    def measures(self) -> bool:
        """Whether the allocation is measured on the weights."""
        return self.allocation == SENSITIVITY or bool(self.refine)

    @property
    def measuring_flag(self) -> str:
        """Flag that requires the measurements."""
        return "--refine" if self.refine else f"--allocation {SENSITIVITY}"
