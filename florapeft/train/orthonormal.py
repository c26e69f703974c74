"""A Trainer's callback that keeps the factors of a start from gradients orthonormal."""

import logging
from typing import Any

import peft
import transformers

from florapeft import FloraConfig, keep_orthonormal

logger = logging.getLogger("florapeft")


class OrthonormalFactors(transformers.TrainerCallback):
    """`florapeft.keep_orthonormal` for a Trainer, also TRL's: `Trainer(…, callbacks=[OrthonormalFactors()])`.

    The model is to have its adapter, started from gradients, before the Trainer gets it. Where factors cannot be kept,
    as with parameters that DeepSpeed or FSDP shard, a warning says why and the training goes on without it.
    """

    _handle = None

    def on_train_begin(self, *_: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self.on_train_end()  # of a training that was broken off
        try:
            self._handle = keep_orthonormal(model, optimizer)
        except ValueError as reason:
            logger.warning(f"factors are not kept orthonormal in this training: {reason}")

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def starts_from_gradients(model: Any) -> bool:
    """Whether the model's active adapter is of FLoRA and began at the gradients' bases."""
    config = model.peft_config[model.active_adapter] if isinstance(model, peft.PeftModel) else None
    return isinstance(config, FloraConfig) and config.init_weights == "gradient"
