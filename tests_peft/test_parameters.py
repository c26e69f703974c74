"""PEFT's tests of bare parameters, on stacks of experts."""

import tests.test_target_parameters as parameters
from tests.test_target_parameters import TestDecoderModelsTargetParameters  # noqa: F401

from florapeft import FloraConfig

# Those of mixed batches and of weighted combinations ask that LoRA refuses; they stay LoRA's.
BORROWED = []

EXPERTS = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": "feed_forward.experts",
    "trl-internal-testing/tiny-GptOssForCausalLM": "mlp.experts",
}

# One stack, another one in each layer, both, one beside modules; pytest holds this very list.
parameters.ALL_CONFIGS[:] = [
    (model, FloraConfig, {"task_type": "CAUSAL_LM", "r": 4, **settings})
    for model, experts in EXPERTS.items()
    for settings in (
        {"target_modules": [], "target_parameters": [f"{experts}.down_proj"]},
        {"target_modules": [], "target_parameters": [f"0.{experts}.gate_up_proj", f"1.{experts}.down_proj"]},
        {"target_modules": None, "target_parameters": [f"{experts}.gate_up_proj", f"{experts}.down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": [f"{experts}.down_proj"]},
    )
]
