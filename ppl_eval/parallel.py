"""Evaluation on several devices: a model divided among them, or processes that each evaluate a shard of the rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.evaluator_utils import get_sample_size
from torch import Tensor

from ppl_eval.truncation import TruncationCountingLM
from slim_utils.common.errors import UserError
from slim_utils.common.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slim_utils.layerwise.distributed import ProcessGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DataParallelLM(TruncationCountingLM):
    """``TruncationCountingLM`` of a loaded model in one of several processes, among which lm-eval divides the rows.

    ``HFLM`` leaves these processes to its subclasses if it is given a model, not a name.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, processes: ProcessGroup, **settings: Any) -> None:
        """Wrap ``model``, whose inputs are on ``device``; ``settings`` are arguments of ``HFLM``."""
        super().__init__(pretrained=model, **settings)
        # Not that of the first weights, which may be offloaded.
        self._device = device
        self._rank, self._world_size = processes.rank, processes.world_size
        self._processes = processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The elements of the tensors of all processes, on the host."""
        return torch.cat([part.flatten() for part in self._processes.all_gather(tensor.cpu())])

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """The objects of all processes by rank; ``None`` on ranks other than ``dst``."""
        values = self._processes.all_gather(obj)
        return values if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        self._processes.all_gather(None)

    def count_truncated(self) -> dict[str, int]:
        """Number of truncated rows of all processes by task, for tasks that have any."""
        counts: Counter[str] = Counter()
        for shard in self._processes.all_gather({task: len(rows) for task, rows in self.truncated.items()}):
            counts.update(shard)
        return dict(counts)


def prepare_shards(tasks: dict[str, Any], processes: ProcessGroup, limit: float | None, num_fewshot: int) -> None:
    """Prepare ``tasks`` for evaluation by several processes, with the prompts of a single process.

    Args:
        tasks: lm-eval's tasks by name.
        processes: the process group.
        limit: rows per task, or a fraction if below 1.
        num_fewshot: few-shot examples per prompt.

    Raises:
        UserError: if a task has fewer rows than there are processes.
    """
    size = processes.world_size
    for name, task in tasks.items():
        available = len(task.eval_docs)
        rows = min(available, get_sample_size(task, limit) or available)
        if rows < size:
            flag = f"--limit {limit:g}" if rows < available else f"--tasks {name}"
            raise UserError(f"{flag}: {rows} rows of {name} for {size} processes; start at most {rows}")
        if size > 1 and num_fewshot:
            _shard_after_sampling(task)


def _shard_after_sampling(task: Any) -> None:
    """Let ``task`` build the prompts of all rows, then keep those of its process.

    Few-shot examples are drawn from one generator row by row: those of a row depend on the rows before it.
    """
    build_all_requests = task.build_all_requests

    def build_shard(*, rank: int, world_size: int, **settings: Any) -> None:
        build_all_requests(rank=0, world_size=1, **settings)
        task._instances = [request for request in task.instances if request.doc_id % world_size == rank]

    task.build_all_requests = build_shard


def load_divided_model(model_path: str, dtype: str, trust_remote_code: bool, offload_folder: str) -> PreTrainedModel:
    """:func:`load_model`, with the layers on all GPUs in turn, then in host memory, then on disk.

    Layers on disk stay in the checkpoint; those that are computed in another format than stored, such as fused experts,
    are copied to ``offload_folder``.

    Raises:
        UserError: if the checkpoint cannot be loaded.
    """
    places = {"device_map": "auto", "offload_folder": offload_folder}
    model = load_model(model_path, dtype, trust_remote_code, language_model=True, **places)
    # Without a map, the whole model fits on one device.
    counts = Counter(map(str, getattr(model, "hf_device_map", {"": model.device}).values()))
    logger.info("--parallelize: modules on %s", ", ".join(f"{place}: {count}" for place, count in counts.items()))
    return model


def highest_peaks(peaks: Iterable[dict[str, float]]) -> dict[str, float]:
    """The highest of several ``peak_memory_mib``, by host and GPU."""
    highest: dict[str, float] = {}
    for peak in peaks:
        for kind, mib in peak.items():
            highest[kind] = max(mib, highest.get(kind, 0.0))
    return highest
