"""First part of the file that ships inside a pruned checkpoint: decoder layers with per-layer heads and FFN widths.

The classes of one family follow it, see ``models/shipped_code.py``. It only depends on ``transformers`` (>= 5.15, for
``per_layer_config``) and adds no modeling code: every layer is the library's class, built from its own entry.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
    raise ImportError(
        f"a model pruned by SlimGPT needs transformers >= 5.15, for per-layer shapes; this is transformers "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

# transformers reads the top-level values when it validates or saves a config, and warns about its own reads.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
    lambda record: not record.getMessage().startswith("Reading global config value for per-layer attribute")
)

PER_LAYER_SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_kv_heads",
    "ffn_hidden_size",
)


class LayerConfigs(Sequence):
    """Configurations of the layers by index; by layer type, that of its first layer, for what its layers share.

    The library's own are not available by layer type where layers of one type differ in size.
    """

    def __init__(self, by_index: Sequence[PreTrainedConfig], layer_types: list[str]) -> None:
        self.by_index, self.layer_types = by_index, layer_types

    def __len__(self) -> int:
        return len(self.by_index)

    def __getitem__(self, layer: Any) -> Any:
        return self.by_index[self.layer_types.index(layer) if isinstance(layer, str) else layer]


class SlimConfigMixin:
    """Mixin of a family's configuration: heads, kv heads and FFN width per layer.

    Top-level values are those of the dense model; the sizes of each layer are in ``per_layer_config``.
    """

    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = True

    @property
    def per_layer_config(self) -> LayerConfigs:
        """Configuration of every layer."""
        layers: Any = PreTrainedConfig.per_layer_config
        return LayerConfigs(layers.fget(self), getattr(self, "layer_types", None) or [])

    @per_layer_config.setter
    def per_layer_config(self, sizes: dict[int | str, dict[str, Any]] | None) -> None:
        layers: Any = PreTrainedConfig.per_layer_config
        layers.fset(self, sizes)


class LayerConfigView:
    """View of the shared configuration with the sizes of one layer.

    ``per_layer_config[i]`` is a copy, which would not follow a later ``set_attn_implementation``.
    """

    def __init__(self, shared: PreTrainedConfig, index: int) -> None:
        self.shared = shared
        layer_config = shared.per_layer_config[index]
        for name in PER_LAYER_SIZES:
            if hasattr(layer_config, name):
                setattr(self, name, getattr(layer_config, name))

    def __getattr__(self, name: str) -> Any:
        if name == "shared":
            # Not set yet while the view is being copied.
            raise AttributeError(name)
        return getattr(self.shared, name)


def init_dense(init: Callable[..., None], config: PreTrainedConfig) -> None:
    """Run the dense ``init`` of the library's class, whose modules are rebuilt afterwards.

    The library consumes ``gradient_checkpointing`` and deletes it from ``config``; it is restored for the new modules.
    """
    checkpointing = getattr(config, "gradient_checkpointing", False)
    init(config)
    if checkpointing:
        config.gradient_checkpointing = checkpointing


class LibraryInitialisation:
    """Mixin: modules are initialised as in a class of the library, which leaves loaded weights alone.

    For other classes transformers skips a module without parameters of its own, whose buffers then hold no values.
    """

    def _initialize_weights(self, module: nn.Module, *_: bool, **__: bool) -> None:
        super()._initialize_weights(module)  # type: ignore[misc]


class SlimModelMixin(LibraryInitialisation):
    """Mixin of a family's model: rebuilds layer ``i`` from ``config.per_layer_config[i]``.

    Attributes:
        layers_name: name of the list of decoder layers in the model.
        head_norms: RMS norms over all heads of a layer, each with the configuration key of their number. With r the
            fraction of heads kept, the mean square over all heads (removed ones zero) is r times that over the
            remaining ones. To match the masked model, epsilon is divided by r; the norm weights are scaled when a
            model is shrunk.
        head_maps: linear maps that the library sizes by the hidden size, as ``head_norms`` then, each with the
            configuration keys of the heads that its rows belong to; the last map has them as columns instead.
        head_counts: attributes that hold a number of heads or of their entries in a layer with ``head_maps``, see
            :func:`head_count`.
        column_maps: linear maps of an FFN whose width the library fixes; the last one has the columns.
        columns_key: configuration key of their width.
        head_biases: keyword arguments of the attention with a part per head of the dense model, see
            :class:`BiasesOfKeptHeads`.
    """

    layers_name = "layers"
    head_norms: tuple[tuple[str, str], ...] = ()
    head_maps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    head_counts: tuple[tuple[str, str], ...] = ()
    column_maps: tuple[str, ...] = ()
    columns_key = ""
    head_biases: tuple[str, ...] = ()
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        init_dense(super().__init__, config)
        layers: Any = self.get_submodule(self.layers_name)  # type: ignore[attr-defined]
        for i, dense in enumerate(layers):
            layers[i] = self._layer(type(dense), config, i)
            register_missing_buffers(layers[i], dense)
        self.post_init()

    def _layer(self, layer_class: Callable[..., nn.Module], config: PreTrainedConfig, index: int) -> nn.Module:
        sizes = config.per_layer_config[index]
        layer_config = config.per_layer_config[index]
        if self.head_maps:
            for name in ("num_attention_heads", "num_key_value_heads", "num_kv_heads"):
                if hasattr(config, name):
                    setattr(layer_config, name, getattr(config, name))
        layer = layer_class(layer_config, index)
        self._resize(layer, sizes, config)
        if self.head_biases and hasattr(sizes, "kept_heads"):
            attention = layer.get_submodule(self.head_maps[-1][0].rpartition(".")[0])
            select = BiasesOfKeptHeads(self.head_biases, sizes.kept_heads, config.num_attention_heads)
            attention.register_forward_pre_hook(select, with_kwargs=True)
        modules = dict(layer.named_modules())
        # Layers with another mixer of tokens have none.
        for name, kind in (pair for pair in self.head_norms if pair[0] in modules):
            norm: Any = modules[name]
            norm.variance_epsilon *= getattr(config, kind) / getattr(sizes, kind)
            if self.head_maps:
                norm.weight = nn.Parameter(norm.weight.new_ones(getattr(sizes, kind) * config.head_dim))
        view = LayerConfigView(config, index)
        for module in layer.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = view  # type: ignore[assignment]
        return layer

    def _resize(self, layer: nn.Module, sizes: PreTrainedConfig, config: PreTrainedConfig) -> None:
        """Give the maps and numbers of heads that the library does not take from a configuration their ``sizes``."""
        widths = {name: sum(getattr(sizes, kind) for kind in kinds) * config.head_dim for name, kinds in self.head_maps}
        widths |= {name: getattr(sizes, self.columns_key) for name in self.column_maps}
        outputs = [*(name for name, _ in self.head_maps[-1:]), *self.column_maps[-1:]]
        for name, width in widths.items():
            layer.set_submodule(name, resized(layer.get_submodule(name), width, name in outputs))
        for name, kind in self.head_counts:
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, head_count(sizes, kind))


class BiasesOfKeptHeads:
    """Forward pre-hook of an attention: selects the biases of its heads among those of all heads of the dense model.

    Args:
        names: keyword arguments of the attention.
        heads: indices of its heads in the dense model.
        num_heads: heads of the dense model.
    """

    def __init__(self, names: tuple[str, ...], heads: list[int], num_heads: int) -> None:
        self.names, self.heads, self.num_heads = names, heads, num_heads

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of the attention with the biases of its heads alone."""
        return args, kwargs | {name: self._selected(kwargs[name]) for name in self.names if name in kwargs}

    def _selected(self, biases: Tensor | None) -> Tensor | None:
        if biases is None:
            return None
        if biases.dim() == 4:
            # A mask that is the same for all heads stays.
            return biases[:, self.heads] if biases.shape[1] == self.num_heads else biases
        # Samples and heads share the first dimension.
        return biases.unflatten(0, (-1, self.num_heads))[:, self.heads].flatten(0, 1)


def register_missing_buffers(layer: nn.Module, dense: nn.Module) -> None:
    """Register the buffers that the library's model, not its layer class, has registered on the layer ``dense``."""
    own = dict(layer.named_buffers())
    for name, buffer in dense.named_buffers():
        if name not in own:
            owner, _, attribute = name.rpartition(".")
            layer.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)


def head_count(sizes: Any, name: str) -> int:
    """Return the number ``name`` of a layer: a configuration key, query heads of a kv head, or entries of all heads."""
    if name == "num_key_value_groups":
        return sizes.num_attention_heads // sizes.num_key_value_heads
    if name == "num_head_entries":
        return sizes.num_attention_heads * sizes.head_dim
    return getattr(sizes, name)


def resized(linear: Any, width: int, columns: bool) -> nn.Module:
    """Return a linear map like ``linear`` with ``width`` rows, or columns."""
    if isinstance(linear, Conv1D):
        rows_out, columns_in = (linear.nf, width) if columns else (width, linear.nx)
        return Conv1D(rows_out, columns_in).to(linear.weight.dtype)
    columns_in, rows_out = (width, linear.out_features) if columns else (linear.in_features, width)
    # A family may have a linear map of its own.
    return type(linear)(columns_in, rows_out, bias=linear.bias is not None, dtype=linear.weight.dtype)


class SlimForCausalLMMixin(LibraryInitialisation):
    """Mixin of a family's causal language model around its slim model.

    Attributes:
        model_class: class of the slim model.
        model_name: name of the model in the causal language model.
    """

    model_name = "model"
    model_class: type[nn.Module]
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        init_dense(super().__init__, config)
        setattr(self, self.model_name, self.model_class(config))
        self.post_init()
        share_lora_defaults(type(config))


def share_lora_defaults(config_class: type[PreTrainedConfig]) -> None:
    """Register the family's default LoRA targets for its slim model type, if peft is imported."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    types = [getattr(parent, "model_type", "") for parent in config_class.__mro__]
    base_type = next(model_type for model_type in types if model_type not in ("", config_class.model_type))
    if base_type in defaults:
        defaults.setdefault(config_class.model_type, defaults[base_type])
