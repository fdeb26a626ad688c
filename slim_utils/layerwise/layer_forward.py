"""Forward passes of one decoder layer on its calibration inputs, with the kwargs that the model passes to it.

A pruned layer runs once, in three parts: to the attention's output map, to the FFN's output map, and to its end.
Each part starts from the outputs of the previous one, and the pruned maps are applied to their cached inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slim_utils.common.errors import UserError
from slim_utils.common.memory import free_memory
from slim_utils.families import FAMILIES, Family, linear_map
from slim_utils.layerwise.distributed import SINGLE_PROCESS, ProcessGroup
from slim_utils.layerwise.layer_kwargs import LayerKwargs
from slim_utils.layerwise.settings import PruningSettings
from slim_utils.obs import solve_bytes
from slim_utils.routers import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _InputSeen(Exception):  # noqa: N818 - not an error
    """Raised to stop a layer once the input of a module is captured."""


class LayerForward:
    """A decoder layer and its calibration inputs.

    The inputs of the FFN's output map are cached where activations stay on the compute device and its memory suffices;
    with activations elsewhere, computing them twice is cheaper than the transfer. A layer with another mixer of tokens
    has no attention to finish; its mixer runs in every part.

    Args:
        layer: on ``settings.device``.
        family: its row of the table.
        hidden: (num_samples, seqlen, hidden) inputs of the layer, on ``settings.cache_dev``.
        calls: the other arguments, on any device.
        settings: devices and micro-batches.
        advanced: number of leading samples that are outputs of the layer already.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        hidden: Tensor,
        calls: LayerKwargs,
        settings: PruningSettings,
        advanced: int = 0,
    ) -> None:
        self.layer = layer
        self.family = family
        self.hidden = hidden
        self.calls = calls.on(settings.device)
        self.settings = settings
        self.advanced = advanced
        # By batch, on cache_dev: inputs of the attention's output map, later its outputs.
        self._attention: list[Tensor] = []
        # By batch: inputs of the FFN's output map.
        self._columns: list[Tensor] = []

    def attention_inputs(self) -> Iterator[Tensor]:
        """Inputs (samples, seqlen, heads · head_dim) of the attention's output map, batch by batch."""
        self._attention = []
        heads_to_hidden = self.layer.get_submodule(self.family.attention_out)
        for samples in self._micro_batches():
            (inputs,) = self._arguments(heads_to_hidden, samples)
            self._attention.append(inputs.to(self.settings.cache_dev))
            yield inputs

    def finish_attention(self) -> None:
        """Apply the pruned output map of the attention to the cached :meth:`attention_inputs`."""
        if self.family.head_norms:
            # A norm over all heads changes the remaining ones too.
            for _ in self.attention_inputs():
                pass
        heads_to_hidden = linear_map(self.layer, self.family.attention_out)
        for position, inputs in enumerate(self._attention):
            output = heads_to_hidden(inputs.to(self.settings.device))
            self._attention[position] = output.to(self.settings.cache_dev)

    def column_inputs(self) -> Iterator[Tensor]:
        """Inputs (samples, seqlen, columns) of the FFN's output map, after :meth:`finish_attention`."""
        columns_to_hidden = self.layer.get_submodule(self.family.mlp_out)
        keep = self._columns_kept(linear_map(self.layer, self.family.mlp_out))
        for (inputs,) in self._arguments_after_attention(columns_to_hidden):
            if keep:
                self._columns.append(inputs)
            yield inputs

    def expert_calls(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs of the layer's router and its choice, batch by batch, after :meth:`finish_attention`.

        Yields:
            (tokens, hidden) inputs, (tokens, k) experts of each, (tokens, k) their weights.
        """
        router = Router.of(self.layer, self.family)
        for (hidden,) in self._arguments_after_attention(router.module):
            tokens = hidden.flatten(end_dim=-2)
            yield tokens, *router.route(tokens)

    def shared_inputs(self) -> Iterator[Tensor]:
        """Inputs (tokens, columns) of the shared expert's output map, scaled by its gate, as :meth:`column_inputs`."""
        columns_to_hidden = self.layer.get_submodule(self.family.shared_map)
        gate = self.layer.get_submodule(self.family.shared_gate) if self.family.shared_gate else None
        shared = self.layer.get_submodule(self.family.shared_expert)
        for (hidden,) in self._arguments_after_attention(shared):
            (inputs,) = _arguments_of(columns_to_hidden, partial(shared, hidden))
            yield inputs if gate is None else inputs * gate(hidden).sigmoid()

    def advance(self) -> None:
        """Replace the inputs of the layer by its outputs, and free the caches."""
        for position, samples in enumerate(self._micro_batches()):
            with ExitStack() as given:
                given.enter_context(self._attention_given(position))
                if self._columns:
                    given.enter_context(self._columns_given(position))
                self.hidden[samples.start : samples.stop] = self._run(samples)
            self.advanced = samples.stop
        self._attention, self._columns = [], []

    def _run(self, samples: range) -> Tensor:
        """Outputs of the layer for these samples."""
        args, kwargs = self.calls.of(samples, self.settings.device)
        hidden = self.hidden[samples.start : samples.stop].to(self.settings.device)
        with self._shared_states(samples) as shared:
            output = self.layer(hidden, *args, **kwargs, **shared)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _shared_states(self, samples: range) -> Iterator[dict[str, Any]]:
        """Context with the argument through which layers share states, if any; what the layer adds is stored."""
        if not self.family.shared_states:
            yield {}
            return
        given = self.calls.shared_of(samples, self.settings.device)
        states = given.copy()
        try:
            yield {self.family.shared_states: states}
        finally:
            for name, state in states.items():
                if state is not given.get(name):
                    self.calls.store(name, state, samples, len(self.hidden), self.settings.cache_dev)

    def _arguments(self, module: nn.Module, samples: range) -> tuple[Tensor, ...]:
        """Arguments that ``module`` is called with on these samples; the layer stops there."""
        return _arguments_of(module, partial(self._run, samples))

    def _arguments_after_attention(self, module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """Arguments that ``module`` is called with, batch by batch, from the cached attention outputs."""
        for position, samples in enumerate(self._micro_batches()):
            with self._attention_given(position):
                arguments = self._arguments(module, samples)
            yield arguments

    def _attention_given(self, position: int) -> Any:
        if not self._attention:
            return nullcontext()
        output = self._attention[position].to(self.settings.device)
        name = self.family.attention_block
        # An attention module returns its weights, or None, as a second value.
        return _forward_replaced(
            self.layer.get_submodule(name), lambda *args, **kwargs: (self._with_residual(name, output, args), None)
        )

    def _columns_given(self, position: int) -> Any:
        columns_to_hidden, name = linear_map(self.layer, self.family.mlp_out), self.family.mlp_block
        inputs = self._columns[position]
        return _forward_replaced(
            self.layer.get_submodule(name),
            lambda *args, **kwargs: self._with_residual(name, columns_to_hidden(inputs), args),
        )

    def _with_residual(self, block: str, output: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
        """The output of a block, which may add the residual, its second argument, to that of its output map."""
        return output + arguments[1] if block in self.family.residual_inside else output

    def _columns_kept(self, columns_to_hidden: nn.Linear) -> bool:
        """Whether the inputs of the FFN's output map take at most half of the memory that its solve leaves free."""
        settings = self.settings
        if settings.device != settings.cache_dev or not self.family.mlp_block:
            return False
        needed = self.hidden[..., 0].numel() * columns_to_hidden.in_features * self.hidden.element_size()
        columns, rows = columns_to_hidden.in_features, columns_to_hidden.out_features
        # The Hessian is there already.
        solve = solve_bytes(columns, rows, columns // 2, settings.solve_dtype) - 4 * columns**2
        return needed <= (free_memory(settings.device) - solve) / 2

    def _micro_batches(self) -> list[range]:
        remaining = self.hidden[self.advanced :]
        spans = self.settings.micro_batches(remaining) if len(remaining) else []
        return [range(self.advanced + start, self.advanced + stop) for start, stop in spans]


def _arguments_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, ...]:
    """Arguments that ``run`` calls ``module`` with; it stops there."""
    seen: list[tuple[Tensor, ...]] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args)
        raise _InputSeen

    handle = module.register_forward_pre_hook(stop)
    try:
        with suppress(_InputSeen):
            run()
    finally:
        handle.remove()
    return seen.pop()


def capture_layer_kwargs(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    samples: Tensor,
    settings: PruningSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Tensor, list[LayerKwargs]]:
    """Run the model with its layers skipped, and record the arguments of every layer.

    Returns:
        The inputs of the first layer (num_samples, seqlen, hidden) on ``cache_dev``, and the kwargs of every layer.
    """
    family = FAMILIES[model.config.model_type]
    first_inputs: list[Tensor] = []
    shared: dict[str, tuple[Tensor, ...]] = {}
    calls = [LayerKwargs(shared=shared) for _ in layers]

    def recorder(index: int, batch: range) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                first_inputs.append(hidden.to(settings.cache_dev))
            calls[index].record(family, args[1:], kwargs, batch, len(samples))
            return _layer_output(family, hidden)

        return forward

    for start, stop in settings.micro_batches(samples):
        with ExitStack() as skipped:
            for index, layer in enumerate(layers):
                skipped.enter_context(_forward_replaced(layer, recorder(index, range(start, stop))))
            model.base_model(input_ids=samples[start:stop].to(model.device), use_cache=False)
    hidden = torch.cat(first_inputs)
    check_finite(hidden, "the embeddings", processes)
    return hidden, calls


@contextmanager
def layer_outputs_given(family: Family, layers: nn.ModuleList, outputs: Iterator[Tensor]) -> Iterator[None]:
    """Context in which forwards run no layer; each takes the next of ``outputs`` as that of the last layer."""
    with ExitStack() as skipped:
        for layer in layers[:-1]:
            skipped.enter_context(_forward_replaced(layer, lambda hidden, *_, **__: _layer_output(family, hidden)))
        skipped.enter_context(_forward_replaced(layers[-1], lambda *_, **__: _layer_output(family, next(outputs))))
        yield


def _layer_output(family: Family, hidden: Tensor) -> Tensor | tuple[Tensor]:
    """``hidden`` as a decoder layer returns it."""
    return (hidden,) if family.tuple_outputs else hidden


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        # Removes the instance attribute; the class's method is visible again.
        del module.forward


def check_finite(hidden: Tensor, where: str, processes: ProcessGroup = SINGLE_PROCESS) -> None:
    """Make sure that activations are finite in all processes.

    Raises:
        UserError: naming ``where`` they are not finite.
    """
    if not processes.all_true(all(torch.isfinite(sample).all() for sample in hidden), hidden.device):
        raise UserError(f"{where}: non-finite activations; try --dtype bfloat16 or float32")
