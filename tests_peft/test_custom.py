"""PEFT's tests on small models of its own, and on one-layer models of the kinds that those lack."""

import tests.test_custom_models as custom
import torch
from models import ONE_LAYER
from repoint import repoint
from tests.test_custom_models import (
    TestDefaultTargetModules,
    TestMixedAdapterBatches,
    TestMultipleActiveAdapters,  # noqa: F401
    TestPeftCustomModel,
    TestPeftFsdpStateDict,
    TestRequiresGrad,  # noqa: F401
)

from florapeft import FloraConfig

T, P = "target_modules", "target_parameters"

# Every kind of layer, kernel ranks, one rank per mode, budgets, patterns, dropout, modules_to_save, the starts.
CASES = [
    ("MLP", {T: "lin0"}),
    ("MLP", {T: ["lin0"]}),
    ("MLP", {T: ["lin0", "lin1"]}),
    ("MLP", {T: ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {T: ["lin0"], "flora_dropout": 0.1}),
    ("MLP", {T: ["lin0", "lin1"], "r": [3, 2]}),
    ("MLP", {T: ["lin0", "lin1"], "r": 64}),
    ("MLP", {T: ["lin0", "lin1"], "rank_pattern": {"lin0": 4, "lin1": [2, 3]}, "scale_pattern": {"lin0": 0.5}}),
    ("MLP", {T: ["lin0", "lin1"], "ranks": {"lin0": [4, 4], "lin1": [1, 3]}}),
    ("MLP", {T: ["lin0", "lin1"], "init_weights": "released"}),
    ("MLP", {T: ["lin0", "lin1"], "init_weights": "variance"}),
    ("MLP", {T: "all-weights"}),
    ("MLP", {T: "all-weights", "budget": 100}),
    ("MLP", {T: "all-weights", "exclude_modules": ["lin1"]}),
    ("MLP", {T: "all-linear"}),
    ("MLP", {T: ["lin0"], P: ["lin1.weight"]}),
    ("MlpUsingParameters", {P: ["lin0.weight"]}),
    ("MlpUsingParameters", {P: ["lin0.weight", "lin1.weight"], "r": [3, 2]}),
    ("MLP_LayerNorm", {T: "all-weights"}),
    ("MHA", {T: ["mha"]}),
    ("MHA", {T: ["mha", "lin0"]}),
    ("EmbConv1D", {T: ["emb"]}),
    ("EmbConv1D", {T: ["emb", "conv1d"]}),
    ("EmbConv1D", {T: ["emb", "conv1d", "lin0"], "r": 2}),
    ("EmbConv1D", {T: ["emb"], "flora_dropout": 0.1, "r": 3}),
    ("Conv1d", {T: ["conv1d"]}),
    ("Conv1d", {T: ["conv1d", "lin0"], "kernel_r": 1}),
    ("Conv1dBigger", {T: ["conv1d"], "r": 4, "kernel_r": 1}),
    ("Conv1dGroups", {T: ["conv1d"], "r": 3}),
    ("pointwise Conv1d", {T: ["conv", "lin0"]}),
    ("Conv2d", {T: ["conv2d", "lin0"]}),
    ("Conv2d", {T: ["conv2d"], "r": 4, "kernel_r": 2}),
    ("Conv2d", {T: ["conv2d"], "r": [4, 3, 2, 1]}),
    ("Conv2d", {T: ["conv2d"], "r": 2, "flora_dropout": 0.2}),
    ("Conv2d", {T: ["conv2d"], "r": 2, "modules_to_save": ["lin0"]}),
    ("Conv2d2", {T: ["lin0", "conv2d", "lin1"], "r": 3}),
    ("Conv2d1x1", {T: ["conv2d"]}),
    ("Conv2dGroups", {T: ["conv2d"]}),
    ("Conv2dGroups2", {T: ["conv2d"], "r": 4}),
    ("strided Conv2d", {T: ["conv"], "r": 4}),
    ("dilated Conv2d", {T: ["conv"], "r": 4}),
    ("circular Conv2d", {T: ["conv"], "r": 4, "kernel_r": 2}),
    ("depthwise Conv2d", {T: ["conv"], "r": 4, "kernel_r": 2}),
    ("Conv3d", {T: ["conv3d"], "r": 4}),
    ("Conv3d", {T: ["conv3d", "lin0"], "r": 4, "kernel_r": 2}),
    ("pointwise Conv3d", {T: ["conv"], "r": 4}),
    ("ConvTranspose1d", {T: ["conv"], "r": 3}),
    ("ConvTranspose2d", {T: ["conv", "lin0"], "r": 3, "kernel_r": 2}),
    ("ConvTranspose2d of groups", {T: ["conv"], "r": 3}),
    ("ConvTranspose3d", {T: ["conv"], "r": 3, "kernel_r": 1}),
]


CLASSES = [FloraConfig]


def pair(name, first, second, tuner="lora"):
    """Two adapters at once; `tuner` is the method whose model and checks PEFT's test takes."""
    return (name, tuner, FloraConfig, {**first, "init_weights": False}, {**second, "init_weights": False})


def tokens(*indices):
    return {"trainable_token_indices": {"emb": list(indices)}}


PAIRS = [
    pair("same", {T: ["lin0"]}, {T: ["lin0"]}),
    pair("different layers", {T: ["lin0"]}, {T: ["lin1"]}),
    pair("different ranks", {T: ["lin0"], "r": 3}, {T: ["lin0"], "r": [2, 5], "scale": 2.0}),
    pair("parameter", {P: ["lin0.weight"]}, {P: ["lin0.weight"]}),
    pair("tokens", {T: ["lin0"], **tokens(0, 1)}, {T: ["lin0"], **tokens(3, 4, 5)}, "lora+trainable_tokens"),
    pair("tokens, layers", {T: ["lin0"], **tokens(0)}, {T: ["conv1d"], **tokens(3, 4)}, "lora+trainable_tokens"),
]


def mixed(name, first, second):
    """Two adapters in one batch, which both change the output."""
    return (name, *(FloraConfig(init_weights=False, **settings) for settings in (first, second)))


MIXED = [
    mixed("same", {T: ["lin0"]}, {T: ["lin0"]}),
    mixed("ranks", {T: ["lin0"]}, {T: ["lin0"], "r": [3, 7], "scale": 2.0}),
]

# These tests of mixed batches have one row each, part of the test's name.
MIXED_ALONE = [
    mixed("different_target_layers", {T: ["lin0"]}, {T: ["lin1"]}),
    mixed("partly_overlapping_target_layers", {T: ["lin0"]}, {T: ["lin0", "lin1"]}),
    mixed("batches_multiple_modules_to_save", *[{T: ["lin0"], "modules_to_save": ["lin1"]}] * 2),
    mixed("lora_conv1d_emb", {T: ["emb", "conv1d"]}, {T: ["emb", "conv1d"], "r": 3}),
    mixed("conv1d_emb_multiple_modules_to_save", *[{T: ["emb", "conv1d"], "modules_to_save": ["lin0"]}] * 2),
    mixed("lora_conv2d", {T: ["conv2d"]}, {T: ["conv2d"], "r": 3, "kernel_r": 2}),
]


class Models(custom.MockTransformerWrapper):
    """PEFT's models, and those of `ONE_LAYER`."""

    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        if model_id not in ONE_LAYER:
            return super().from_pretrained(model_id, dtype)
        torch.manual_seed(0)
        return ONE_LAYER[model_id]().to(dtype or torch.float32)


BORROWED = [
    # 3 steps at HiRA's rate of 100; at 0.5 a tensor or two of a convolution moves by less than the 1e-4 asked for.
    ("test_only_params_are_updated", "test_custom_models.HiraConfig"),
]

# pytest holds these very lists.
custom.TEST_CASES[:] = [(str(n), model, FloraConfig, settings) for n, (model, settings) in enumerate(CASES, 1)]
custom.ALL_PEFT_CONFIG_CLASSES[:] = CLASSES
custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = PAIRS
custom.MIXED_ADAPTER_TEST_CASES[:] = MIXED
repoint(TestDefaultTargetModules, "test_", "config_cls", CLASSES)
repoint(TestMixedAdapterBatches, "wrong_adapter_name", "test_name, config", [MIXED[0][:2]])
for row in MIXED_ALONE:
    repoint(TestMixedAdapterBatches, row[0], "test_name, config0, config1", [row])
TestPeftCustomModel.transformers_class = TestPeftFsdpStateDict.transformers_class = Models
