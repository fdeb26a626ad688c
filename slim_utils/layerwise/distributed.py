"""The process group of a run, each process on its shard of the calibration samples or of the rows of a task (torchrun).

accelerate's ``PartialState`` is not used: it offers no timeout of an hour, no broadcast of errors, and imports slowly.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from slim_utils.common.errors import ProcessLostError, UserError

T = TypeVar("T")
# A process may wait while another one solves a large map.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


def launched_processes() -> int:
    """Number of processes of this run, as set by torchrun or accelerate launch; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_current(device: torch.device) -> None:
    """Make ``device`` the current one if it is a GPU with a number; ``cuda`` is the current one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class _SharedError(UserError):
    """A wrong input that one process found and all of them raise."""


@dataclass(frozen=True)
class _Failure:
    """What a process sends after an error, in place of a value.

    Attributes:
        message: that of its :class:`UserError`; ``None`` if the process reports another error itself.
    """

    message: str | None


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
    def init(cls, device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> "ProcessGroup":
        """The process group that torchrun started, or this process alone; all compute on devices of one kind."""
        size = launched_processes()
        if size == 1:
            return cls()
        make_current(device)
        # Activations may be kept on the host while layers are pruned on a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timeout)
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

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; a value is any object that can be pickled.

        Raises:
            UserError: in all processes, if one of them raised it in a block of :meth:`shared_errors`.
            SystemExit: if one of them raised another error there, which it reports itself.
        """
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with _lost_contact_named():
            distributed.all_gather_object(gathered, value)
        failure = next((item for item in gathered if isinstance(item, _Failure)), None)
        if failure is None:
            return gathered
        raise SystemExit(1) if failure.message is None else _SharedError(failure.message)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """End the block in all processes if one of them raises an error in it, at their next :meth:`all_gather`.

        The block contains no other collective. Rank 0 reports a :class:`UserError`, the process itself other errors.
        """
        try:
            yield
        except (ProcessLostError, _SharedError):
            raise
        except Exception as error:
            # An error of this process says more than one of the collective.
            with suppress(ProcessLostError, SystemExit):
                self.all_gather(_Failure(str(error) if isinstance(error, UserError) else None))
            raise

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
                # Weights that are stored transposed; collectives need contiguous tensors.
                transposed = tensor.dim() == 2 and not tensor.is_contiguous()
                distributed.broadcast(tensor.T if transposed else tensor, src=0)
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
