"""Arguments that a model passes to its decoder layers on the calibration windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slim_utils.families import Family


@dataclass
class LayerKwargs:
    """Positional and keyword arguments of a layer besides the hidden states.

    Windows have one length and no padding, so the arguments depend on the batch size alone; not so inputs that a token
    has besides its hidden states, and states that a layer stores for later ones, such as keys and values.

    Attributes:
        by_batch_size: arguments by batch size, without those below.
        token_inputs: (num_samples, seqlen, size) first argument, on the host; ``None`` for layers without.
        shared: stored states (num_samples, ...) by name; one dictionary for all layers.
    """

    by_batch_size: dict[int, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    token_inputs: Tensor | None = None
    shared: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def record(self, family: Family, args: tuple, kwargs: dict[str, Any], samples: range, num_samples: int) -> None:
        """Record the arguments of one call.

        Args:
            family: row of the model.
            args: positional arguments after the hidden states.
            kwargs: keyword arguments.
            samples: those of the call.
            num_samples: all samples.
        """
        kwargs = {name: value for name, value in kwargs.items() if name != family.shared_states}
        if family.token_inputs and isinstance(args[0], Tensor):
            if self.token_inputs is None:
                self.token_inputs = args[0].new_empty(num_samples, *args[0].shape[1:], device="cpu")
            self.token_inputs[samples.start : samples.stop] = args[0]
            args = (None, *args[1:])
        self.by_batch_size[len(samples)] = args, kwargs

    def with_batches_of(self, other: LayerKwargs) -> LayerKwargs:
        """Return these arguments with those by batch size of ``other``, which were recorded in other batches."""
        return replace(self, by_batch_size=other.by_batch_size)

    def on(self, device: torch.device) -> LayerKwargs:
        """Return these arguments with those by batch size on ``device``."""
        from accelerate.utils import send_to_device

        return replace(self, by_batch_size=send_to_device(self.by_batch_size, device))

    def of(self, samples: range, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        """Return the positional and keyword arguments of a call with these samples, without shared states."""
        args, kwargs = self.by_batch_size[len(samples)]
        if self.token_inputs is not None:
            args = (self.token_inputs[samples.start : samples.stop].to(device), *args[1:])
        return args, kwargs

    def shared_of(self, samples: range, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
        """Return the stored states of these samples."""
        part = slice(samples.start, samples.stop)
        return {name: tuple(state[part].to(device) for state in states) for name, states in self.shared.items()}

    def store(
        self, name: str, states: tuple[Tensor, ...], samples: range, num_samples: int, device: torch.device
    ) -> None:
        """Store the states ``name`` of these samples, on ``device``."""
        if name not in self.shared:
            self.shared[name] = tuple(state.new_empty(num_samples, *state.shape[1:], device=device) for state in states)
        for stored, state in zip(self.shared[name], states, strict=True):
            stored[samples.start : samples.stop] = state

    def move_shared(self, device: torch.device) -> None:
        """Move the stored states to ``device``."""
        self.shared.update({name: tuple(state.to(device) for state in states) for name, states in self.shared.items()})
