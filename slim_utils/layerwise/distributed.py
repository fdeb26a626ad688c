"""The process group that prunes one model, each process on its shard of the calibration samples (torchrun).

accelerate's ``PartialState`` is not used: it offers no timeout of an hour, no broadcast of errors, and imports slowly.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from slim_utils.common.errors import ProcessLostError, UserError

T = TypeVar("T")
# A process may wait while another one solves a large map.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; with a single process, collectives cost nothing.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def init(cls, device: torch.device) -> "ProcessGroup":
        """The process group that torchrun started, or this process alone; all compute on devices of one kind."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Activations may be kept on the host while layers are pruned on a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return cls(distributed.get_rank(), size)

    def destroy(self) -> None:
        """Wait for all processes and end the group."""
        self.barrier()
        if self.world_size > 1:
            distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            with _lost_contact_named():
                distributed.barrier()

    def shard(self, samples: Tensor, flag: str = "--num_samples") -> Tensor:
        """This process's shard of the samples, which ``flag`` set the number of; shards differ by one sample at most.

        Raises:
            UserError: if there are fewer samples than processes.
        """
        if len(samples) < self.world_size:
            raise UserError(f"{flag} {len(samples)}: fewer than the {self.world_size} processes")
        return samples.tensor_split(self.world_size)[self.rank]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            with _lost_contact_named():
                distributed.all_reduce(tensor)

    def all_true(self, condition: bool, device: torch.device) -> bool:
        """Whether ``condition`` holds in all processes."""
        failed = torch.tensor(float(not condition), device=device)
        self.all_reduce(failed)
        return failed.item() == 0

    def on_main(self, work: Callable[[], T], changed: Iterable[Tensor] = ()) -> T:
        """Run ``work`` on the main process; broadcast its result and the tensors that it ``changed``.

        Raises:
            UserError: in all processes, if ``work`` raises one.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[0] = error
        with _lost_contact_named():
            distributed.broadcast_object_list(outcome, src=0)
            if isinstance(outcome[0], UserError):
                raise outcome[0]
            for tensor in changed:
                distributed.broadcast(tensor, src=0)
        return outcome[0]


@contextmanager
def _lost_contact_named() -> Iterator[None]:
    """Turn the backends' errors about lost processes into one error that keeps the reason.

    Errors of this process's own device, out of memory among them, stay unchanged.

    Raises:
        ProcessLostError: if contact with another process is lost.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessLostError(f"lost contact with another process (see its log): {reason}") from error


SINGLE_PROCESS = ProcessGroup()
