"""Training with sharded weights, by ZeRO-3 or FSDP2: no process holds a whole model.

1. A checkpoint is read one decoder layer at a time; every process keeps its part of a layer before the next is read.
2. While it trains, a layer is gathered for as long as it computes.
3. The trained weights are gathered one layer at a time, and rank 0 writes one shard of the checkpoint for each.

Perplexities are measured by rank 0 on the checkpoints on disk, layer by layer.
"""

from __future__ import annotations

import copy
import shutil
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ppl_eval.ppl_dataset import EvalSets
from ppl_eval.streamed_eval import evaluate_layers
from slim_utils.common.adapters import FUSED_FOLDER, load_adapters, merge_adapters
from slim_utils.common.atomic_output import scratch_folder
from slim_utils.common.errors import UserError
from slim_utils.common.output_folder import hidden_path
from slim_utils.layerwise.offload import CPU, OffloadedModel
from slim_utils.output.writers import CheckpointShards
from train_utils.finetune_args import FinetuneArguments
from train_utils.finetune_dataset import FinetuneData
from train_utils.finetune_result import ModelMasks
from train_utils.lora import TARGETS_FLAG
from train_utils.model_weights import ModelWeights, WholeWeights
from train_utils.sharding_checks import offloads_to_cpu, uses_fsdp, uses_zero3
from train_utils.trainable import cast_parameters, frozen_dtype, prepare_model

if TYPE_CHECKING:
    from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase


def model_weights(args: FinetuneArguments, masks: ModelMasks | None) -> ModelWeights:
    """The weights of a run: sharded if the flags request it, else whole, with the ``masks`` of the model."""
    if uses_zero3(args.training):
        return Zero3Weights(args)
    return FullyShardedWeights(args) if uses_fsdp(args.training) else WholeWeights(args, masks)


class ShardedWeights(ModelWeights):
    """Loads, trains and saves models whose weights are split among the processes.

    :meth:`load`, :meth:`load_teacher` and :meth:`gather` are collectives.

    Args:
        args: flags of the run.

    Attributes:
        one_dtype: whether trained weights have the dtype of frozen ones.
    """

    one_dtype = False

    def __init__(self, args: FinetuneArguments) -> None:
        super().__init__(args)
        self.device: torch.device = args.training.device
        self._is_main = args.training.process_index == 0
        self._staging = hidden_path(Path(args.training.output_dir), "partial-sharded")

    @abstractmethod
    def shard(self, module: nn.Module) -> None:
        """Split the parameters of ``module`` that are not split yet."""

    @abstractmethod
    def gather_parameters(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return whole ``parameters`` in host memory on rank 0, and ``{}`` elsewhere."""

    def for_inference(self, model: PreTrainedModel) -> nn.Module:
        """Return the sharded, frozen ``model`` in a form that runs forwards."""
        return model

    def open(self, path: str, role: str) -> OffloadedModel:
        """Open the checkpoint ``path``; its weights stay on disk.

        Args:
            path: checkpoint folder or hub name.
            role: name of the scratch folder; two models that are open at once have different ones.

        Raises:
            UserError: if the checkpoint cannot be loaded, or its family is not supported.
        """
        _forget_zero3()
        scratch = scratch_folder(Path(self.args.training.output_dir))
        return OffloadedModel(
            path, "auto", self.args.model.trust_remote_code, scratch.with_name(f"{scratch.name}-{role}")
        )

    def open_base(self) -> OffloadedModel:
        """Open the model to train."""
        return self.open(self.args.model.model_name_or_path, "base")

    def open_teacher(self) -> OffloadedModel:
        """Open the model of ``--distill_from``.

        Raises:
            UserError: if the teacher cannot be loaded.
        """
        assert self.args.model.distill_from is not None
        try:
            return self.open(self.args.model.distill_from, "teacher")
        except UserError as error:
            raise UserError(f"--distill_from: {error}") from error

    def evaluate_base(self, base: OffloadedModel, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of the base checkpoint, measured layer by layer."""
        return self._evaluate(self.args.model.model_name_or_path, windows)

    def load(self, base: OffloadedModel) -> PreTrainedModel | PeftModel:
        """Return the sharded model to train, set up by :func:`prepare_model`; closes ``base``.

        Raises:
            UserError: if an adapter lies outside the decoder layers.
        """
        with closing(base):
            if self.args.model.use_lora:
                cast_parameters(base.model, frozen_dtype(self.args.training))
                # peft initialises adapters on the device of the weights that they adapt.
                _assign(base.model, _placeholders(base.model.named_parameters()), CPU)
                base.model.tie_weights()
            model = prepare_model(base.model, self.args)
            if self.args.model.use_lora and _trained_outside_layers(model, base):
                raise UserError(
                    f"{TARGETS_FLAG} {self.args.model.peft_target_modules}: sharded weights are adapted in the decoder "
                    "layers only; leave out embeddings and head"
                )
            if self.one_dtype:
                cast_parameters(model, frozen_dtype(self.args.training))
            self._fill(base, model)
            return model

    def load_teacher(
        self,
        teacher: OffloadedModel,
        data: FinetuneData,
        collator: DataCollatorForSeq2Seq,
        settings: dict[str, Any],
    ) -> nn.Module:
        """Return the sharded and frozen model; closes ``teacher``."""
        with closing(teacher):
            cast_parameters(teacher.model, frozen_dtype(self.args.training))
            self._fill(teacher, teacher.model.requires_grad_(False))
            return self.for_inference(teacher.model)

    def gather(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the trained model to a folder beside the output, from where :meth:`write` moves it.

        Args:
            model: the trained model, sharded.
            tokenizer: tokenizer of the base.
        """
        if self._is_main:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        if not self.args.model.use_lora:
            self._save_weights(model, tokenizer)
            return
        adapters = self.gather_parameters(_trained(model))
        if self._is_main:
            model.save_pretrained(self._staging, state_dict=adapters, save_embedding_layers=False)
            self._save_fused(tokenizer)

    def write(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> PreTrainedModel:
        """Move the result of :meth:`gather` into ``folder``; return the model as loaded from there, without weights."""
        for entry in list(self._staging.iterdir()):
            entry.replace(folder / entry.name)
        self._staging.rmdir()
        with closing(self.open(self._checkpoint(folder), "saved")) as host:
            return host.model

    def evaluate_result(self, result: PreTrainedModel, folder: Path, windows: EvalSets) -> list[dict[str, Any]]:
        """Return the perplexities of the checkpoint in ``folder``, measured layer by layer."""
        return self._evaluate(self._checkpoint(folder), windows)

    def _evaluate(self, path: str, windows: EvalSets) -> list[dict[str, Any]]:
        with closing(self.open(path, "evaluated")) as host:
            return evaluate_layers(host, self.device, windows)

    def _checkpoint(self, folder: Path) -> str:
        """Folder of the whole model in the output folder ``folder``."""
        return str(folder / FUSED_FOLDER if self.args.model.use_lora else folder)

    def _fill(self, host: OffloadedModel, model: PreTrainedModel | PeftModel) -> None:
        """Read the weights of ``model``, which is or wraps the model of ``host``, and shard every layer once read."""
        for index, layer in enumerate(host.layers):
            _assign(layer, host.read_layer(index), self.device)
            self.shard(layer.to(self.device))
        base = host.model
        _assign(base, host.read_non_layer_tensors(), self.device)
        base.tie_weights()
        for name, buffer in list(base.named_buffers()):
            parent, _, buffer_name = name.rpartition(".")
            setattr(base.get_submodule(parent), buffer_name, buffer.to(self.device))
        self.shard(model)

    def _save_weights(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the base checkpoint with the trained weights of ``model``, in its dtype and format."""
        with closing(self.open_base()) as host:
            shards = CheckpointShards(self._staging, host.model, host.family) if self._is_main else None
            for index, layer in enumerate(host.family.decoder_layers(model)):
                trained = self.gather_parameters(_trained(layer))
                if shards:
                    shards.write_layer(index, _replaced(host.read_layer(index), trained))
            trained = self.gather_parameters(_trained_outside_layers(model, host))
            if shards:
                shards.write_non_layer_tensors(_replaced(host.read_non_layer_tensors(), trained))
                shards.finish(tokenizer)

    def _save_fused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the base checkpoint with the saved adapters fused in, layer by layer; on rank 0."""
        # Adding adapters changes a model; the configuration and code of the result are those of another instance.
        with closing(self.open_base()) as unchanged:
            shards = CheckpointShards(self._staging / FUSED_FOLDER, unchanged.model, unchanged.family)
        with closing(self.open_base()) as host:
            _assign(host.model, _placeholders(host.model.named_parameters()), CPU)
            load_adapters(host.model, str(self._staging))
            for index, layer in enumerate(host.layers):
                stored = host.read_layer(index)
                _assign(layer, stored, CPU)
                merge_adapters(layer)
                shards.write_layer(index, {name: _get(layer, name).detach() for name in stored})
                _assign(layer, _placeholders(stored.items()), CPU)
            shards.write_non_layer_tensors(host.read_non_layer_tensors())
            shards.finish(tokenizer)


class FullyShardedWeights(ShardedWeights):
    """FSDP2: every decoder layer is a group of parameters, and so are all other modules together."""

    def __init__(self, args: FinetuneArguments) -> None:
        super().__init__(args)
        training = args.training
        self._mesh = init_device_mesh(self.device.type, (training.world_size,))
        self._precision = MixedPrecisionPolicy()
        if training.bf16:
            self._precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        config: dict[str, Any] = training.fsdp_config
        # Without an accelerator, weights are in host memory already.
        offloads = offloads_to_cpu(config) and self.device.type != "cpu"
        self._offload = CPUOffloadPolicy() if offloads else OffloadPolicy()
        self._reshard = bool(config.get("reshard_after_forward", True))
        # The model that accelerate gets is wrapped, and a whole state dict would gather it on rank 0.
        training.fsdp_plugin_args |= {"auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}

    def shard(self, module: nn.Module) -> None:
        """Split the parameters of ``module`` that are not split yet."""
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=self._reshard,
            mp_policy=self._precision,
            offload_policy=self._offload,
        )

    def gather_parameters(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return whole ``parameters`` in host memory on rank 0, and ``{}`` elsewhere."""
        gathered = {}
        for name, parameter in parameters.items():
            # Sharded parameters are DTensors, whose methods mypy does not see behind Parameter.
            shard: Any = parameter.detach()
            whole = shard.to(self.device).full_tensor()
            if self._is_main:
                gathered[name] = whole.cpu()
        return gathered


class Zero3Weights(ShardedWeights):
    """DeepSpeed's ZeRO-3: every parameter is split by itself."""

    # The optimizer keeps fp32 copies of the trained weights.
    one_dtype = True

    def __init__(self, args: FinetuneArguments) -> None:
        super().__init__(args)
        import deepspeed

        # Its configuration is checked against the number of processes that it knows of.
        deepspeed.init_distributed()
        self._config: dict[str, Any] = args.training.deepspeed_plugin.deepspeed_config
        _forget_zero3()

    def shard(self, module: nn.Module) -> None:
        """Split the parameters of ``module`` that are not split yet."""
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=self._config)

    def gather_parameters(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return whole ``parameters`` in host memory on rank 0, and ``{}`` elsewhere."""
        import deepspeed

        gathered = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._is_main:
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def for_inference(self, model: PreTrainedModel) -> nn.Module:
        """Return a DeepSpeed engine of ``model`` without an optimizer."""
        import deepspeed

        config = copy.deepcopy(self._config)
        hidden_size = model.config.get_text_config().hidden_size
        # The values that the Trainer sets for a model to train.
        sizes = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        zero = config["zero_optimization"]
        zero |= {name: value for name, value in sizes.items() if zero.get(name) == "auto"}
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()
        return engine


def _forget_zero3() -> None:
    """Let transformers open models as usual, which it refuses while it knows of a configuration of ZeRO-3."""
    unset_hf_deepspeed_config()


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of elements of a whole parameter, sharded or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _trained_outside_layers(model: nn.Module, host: OffloadedModel) -> dict[str, nn.Parameter]:
    inside = {id(parameter) for parameter in host.family.decoder_layers(_base(model)).parameters()}
    return {name: parameter for name, parameter in _trained(model).items() if id(parameter) not in inside}


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _replaced(stored: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """``stored`` with the values of ``trained`` in its dtypes."""
    return {name: trained[name].to(value.dtype) if name in trained else value for name, value in stored.items()}


def _placeholders(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors on the CPU of the shapes and dtypes of ``tensors``, each with the memory of one element."""
    return {name: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of the parameter that is called ``name`` without adapters, and its name there."""
    path, _, parameter_name = name.rpartition(".")
    for part in filter(None, path.split(".")):
        module = getattr(module, part)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
    return module, parameter_name


def _get(module: nn.Module, name: str) -> Tensor:
    owner, parameter_name = _owner(module, name)
    return getattr(owner, parameter_name)


def _assign(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give the parameters of ``module`` the values of ``tensors``, on ``device`` and in the dtypes they have."""
    for name, tensor in tensors.items():
        owner, parameter_name = _owner(module, name)
        old = getattr(owner, parameter_name)
        value = tensor.to(device, old.dtype)
        setattr(owner, parameter_name, nn.Parameter(value, old.requires_grad))
