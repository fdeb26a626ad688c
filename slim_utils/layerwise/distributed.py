"""Several processes that prune one model together, each on its share of the calibration samples (torchrun)."""

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
# How long a process waits for the others, which may have a whole Hessian to solve.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """The processes of a run; alone, every method does what its name says at no cost.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The processes that torchrun started, or this one alone; all compute on devices of one kind."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Activations may be kept on the host while layers are pruned on a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
        return cls(distributed.get_rank(), size)

    def leave(self) -> None:
        """Wait for all, and go apart."""
        self.wait()
        if self.size > 1:
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _others_there():
                distributed.barrier()

    def share(self, samples: Tensor, flag: str = "--num_samples") -> Tensor:
        """This process's samples, whose number was given as ``flag``; shares differ by one sample at most.

        Raises:
            UserError: if there are fewer samples than processes.
        """
        if len(samples) < self.size:
            raise UserError(f"{flag} {len(samples)}: fewer than the {self.size} processes")
        return samples.tensor_split(self.size)[self.rank]

    def sum(self, tensor: Tensor) -> None:
        """Add up, in place, the tensors of all processes."""
        if self.size > 1:
            with _others_there():
                distributed.all_reduce(tensor)

    def everywhere(self, condition: bool, device: torch.device) -> bool:
        """Whether ``condition`` holds in all processes."""
        failed = torch.tensor(float(not condition), device=device)
        self.sum(failed)
        return failed.item() == 0

    def once(self, work: Callable[[], T], changed: Iterable[Tensor] = ()) -> T:
        """The result of ``work`` in the first process, with its effect on the tensors ``changed``, in all of them.

        Raises:
            UserError: in all, if ``work`` raises one.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[0] = error
        with _others_there():
            distributed.broadcast_object_list(outcome, src=0)
            if isinstance(outcome[0], UserError):
                raise outcome[0]
            for tensor in changed:
                distributed.broadcast(tensor, src=0)
        return outcome[0]


@contextmanager
def _others_there() -> Iterator[None]:
    """Turn the backends' errors about processes that are gone into one that keeps their reason.

    Errors of this process's own device, full memory among them, stay as they are.

    Raises:
        ProcessLostError: if another process has ended.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessLostError(f"another process has ended, and says why if it could ({reason})") from error


ALONE = World()
