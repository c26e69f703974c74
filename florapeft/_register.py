"""Registers the method FLORA with PEFT, once; the second and last place that touches PEFT's tables."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from florapeft._peft_type import FLORA
from florapeft.config import FloraConfig
from florapeft.model import FloraModel


def register() -> None:
    """Make `FloraConfig` and `FloraModel` PEFT's method FLORA. Calling it again is silent.

    Raises:
        ImportError: PEFT's tables already hold a FLORA that is not this package's.
    """
    config, model = PEFT_TYPE_TO_CONFIG_MAPPING.get(FLORA), PEFT_TYPE_TO_TUNER_MAPPING.get(FLORA)
    if (config, model) == (FloraConfig, FloraModel):
        return
    if config is not None or model is not None:
        raise ImportError(
            f"PEFT already has a method named FLORA, {config or model}, which is not florapeft's: "
            "import only one of the two in a process"
        )
    register_peft_method(name="flora", config_cls=FloraConfig, model_cls=FloraModel, prefix=FloraModel.prefix)
