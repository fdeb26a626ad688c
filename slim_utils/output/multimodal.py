"""Checkpoints of a multimodal model whose language model is pruned; its other parts are unchanged."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from models.registry import slim_wrapper_classes
from models.wrappers import find_wrapper
from slim_utils.common.checkpoint_checks import building
from slim_utils.common.loading import PRUNED_MODEL_FOLDER, load_multimodal_model, save_checkpoint, stored_file
from slim_utils.output.writers import Checkpoints, CheckpointWriter
from slim_utils.params_remove import shrink, zero_removed
from slim_utils.pruned_config import per_layer_fields, stock_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slim_utils.families import Family
    from slim_utils.masks import LayerMask

# Files of a processor beside those of its tokenizer.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class MultimodalOutput(CheckpointWriter):
    """Writer of a multimodal model, in host memory, around a language model that is pruned.

    Args:
        model: the language model by itself; masked in place when written.
        family: family of the language model by itself.
        planned: masks with the planned sizes.
        checkpoints: what to write.
        model_path: checkpoint of the multimodal model.
        dtype: key of ``DTYPES``.
        trust_remote_code: run model code found in the checkpoint.

    Raises:
        UserError: if a stock class is requested that does not allow the shapes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        planned: list[LayerMask],
        checkpoints: Checkpoints,
        model_path: str,
        dtype: str,
        trust_remote_code: bool,
    ) -> None:
        super().__init__(model, family)
        self.checkpoints, self.model_path = checkpoints, model_path
        self.dtype, self.trust_remote_code = dtype, trust_remote_code
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self.wrapper = find_wrapper(config)
        if checkpoints.pruned:
            # Fails before the pruning rather than after it.
            self._pruned_config(config, planned)

    def write(self, folder: Path, masks: list[LayerMask], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
        """Write the checkpoints; returns the pruned language model by itself."""
        zero_removed(self.model, self.family, masks)
        multimodal = load_multimodal_model(self.model_path, self.dtype, self.trust_remote_code)
        if not getattr(self.model.config, "tie_word_embeddings", False):
            multimodal.config.tie_word_embeddings = multimodal.config.text_config.tie_word_embeddings = False
        others = self._others(multimodal)
        if self.checkpoints.masked:
            self._save(multimodal, self.model, others, tokenizer, folder)
        if not self.checkpoints.pruned:
            return None
        pruned_language_model = shrink(self.model, self.family, masks)
        config = self._pruned_config(multimodal.config, masks)
        with building(config), torch.device("meta"):
            pruned = AutoModelForImageTextToText.from_config(config, dtype=multimodal.dtype)
        pruned.generation_config = multimodal.generation_config
        self._save(pruned, pruned_language_model, others, tokenizer, folder / PRUNED_MODEL_FOLDER)
        return pruned_language_model

    def _others(self, multimodal: PreTrainedModel) -> dict[str, Tensor]:
        """The weights of ``multimodal`` outside its language model."""
        language_model = {self.wrapper.wrapped_name(name) for name in self.model.state_dict()}
        return {name: tensor for name, tensor in multimodal.state_dict().items() if name not in language_model}

    def _save(
        self,
        multimodal: PreTrainedModel,
        language_model: PreTrainedModel,
        others: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
    ) -> None:
        """Save ``multimodal``, whose own weights are not used."""
        state = {self.wrapper.wrapped_name(name): tensor for name, tensor in language_model.state_dict().items()}
        # Only stock types have a conversion from the stored names.
        stock = multimodal.config.model_type == self.wrapper.base_type
        save_checkpoint(multimodal, tokenizer, folder, state_dict={**others, **state}, save_original_format=stock)
        for name in PROCESSOR_FILES:
            file = stored_file(self.model_path, name)
            if file is not None:
                shutil.copyfile(file, folder / name)

    def _pruned_config(self, config: PreTrainedConfig, masks: list[LayerMask]) -> PreTrainedConfig:
        """Configuration of the pruned multimodal model: of the stock class, or with per-layer shapes."""
        text, family = config.text_config, self.wrapper.family
        if self.checkpoints.stock:
            pruned = copy.deepcopy(config)
            pruned.text_config = stock_config(text, family, masks)
            return pruned
        classes = slim_wrapper_classes(self.wrapper)
        fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "auto_map")}
        fields["text_config"] = classes.text_config(**per_layer_fields(text, family, masks))
        return classes.config(**fields)
