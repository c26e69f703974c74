"""What merging leaves behind after unmerging, to the last bit; and what a layer answers for its base layer."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig

# name: module, its weights
KINDS = {
    "linear": (lambda: nn.Linear(30, 20), ["weight"]),
    "linear stored (in, out)": (lambda: Conv1D(20, 30), ["weight"]),
    "conv1d": (lambda: nn.Conv1d(12, 16, 3), ["weight"]),
    "conv2d": (lambda: nn.Conv2d(12, 16, 3), ["weight"]),
    "conv2d depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), ["weight"]),
    "conv3d": (lambda: nn.Conv3d(6, 8, 3), ["weight"]),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(12, 16, 3), ["weight"]),
    "conv transposed 2d": (lambda: nn.ConvTranspose2d(12, 16, 3), ["weight"]),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, 3), ["weight"]),
    "embedding": (lambda: nn.Embedding(30, 20, padding_idx=0), ["weight"]),
    "attention": (lambda: nn.MultiheadAttention(16, 2), ["in_proj_weight", "out_proj.weight"]),
    "gain": (lambda: nn.LayerNorm(200), ["weight"]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attach(name, dtype, magnitude=1.0, scales=(1.0,)):
    make, weights = KINDS[name]
    module = make().to(dtype)
    for parameter in module.parameters():  # entries of all sizes, down to float16's subnormal numbers
        parameter.data = (torch.randn_like(parameter) * 10.0 ** (5 * torch.rand_like(parameter) - 5)).to(dtype)
    targets = {"target_parameters": ["layer.weight"]} if name == "gain" else {"target_modules": ["layer"]}
    for i, scale in enumerate(scales):
        config = FloraConfig(r=4, init_weights=False, scale=scale * magnitude, **targets)
        if i == 0:
            model = get_peft_model(nn.ModuleDict({"layer": module}), config, adapter_name="first")
        else:
            model.add_adapter("second", config)
    return model, model.base_model.model.layer, module, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scales", [(1.0,), (1.0, -0.7)])
@pytest.mark.parametrize("magnitude", [1e-3, 10.0])
def test_unmerging_is_within_its_bound(name, dtype, magnitude, scales):
    model, layer, module, names = attach(name, dtype, magnitude, scales)
    adapters = ["first", "second"][: len(scales)]
    original = {weight: module.get_parameter(weight).detach().double() for weight in names}
    merged, bound = dict(original), dict.fromkeys(names, 0.0)
    for adapter in adapters:
        for weight, delta in layer.delta_weights(adapter).items():
            before, merged[weight] = merged[weight], merged[weight] + delta.detach().double()
            bound[weight] += before.abs() + merged[weight].abs()
    model.merge_adapter(adapters)
    assert layer.merged_adapters == adapters
    model.unmerge_adapter()
    for weight in names:
        error = (module.get_parameter(weight).detach().double() - original[weight]).abs()
        assert (error <= 1.01 * torch.finfo(dtype).eps / 2 * bound[weight]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_of_the_bound_is_not_enough(dtype):
    model, layer, module, _ = attach("linear", dtype)
    original = module.weight.detach().double()
    bound = original.abs() + (original + layer.get_delta_weight("first").detach().double()).abs()
    model.merge_adapter()
    model.unmerge_adapter()
    error = (module.weight.detach().double() - original).abs()
    assert (error > torch.finfo(dtype).eps / 4 * bound).any()


class TestAttributes:
    @pytest.mark.parametrize(
        ("module", "attributes"),
        [
            (nn.Conv2d(4, 6, 3, stride=2, groups=2), ["stride", "kernel_size", "groups", "padding_mode", "transposed"]),
            (nn.Embedding(9, 4, padding_idx=2), ["num_embeddings", "embedding_dim", "padding_idx", "max_norm"]),
            (Conv1D(4, 6), ["nf", "nx", "weight", "bias"]),
            (nn.MultiheadAttention(8, 2), ["embed_dim", "num_heads", "batch_first", "_qkv_same_embed_dim", "head_dim"]),
        ],
    )
    def test_are_those_of_the_base_layer(self, module, attributes):
        model = get_peft_model(nn.ModuleDict({"layer": module}), FloraConfig(r=2, target_modules=["layer"]))
        layer = model.base_model.model.layer
        for name in attributes:
            assert getattr(layer, name) is getattr(module, name)
        assert not hasattr(layer, "nonsense")
        with pytest.raises(AttributeError, match=f"'{type(module).__name__}' object has no attribute 'nonsense'"):
            _ = layer.nonsense

    def test_not_how_the_base_layer_is_copied(self):
        class Own(nn.Linear):
            def __deepcopy__(self, memo):
                return nn.Linear(4, 6)

        model = get_peft_model(nn.ModuleDict({"layer": Own(4, 6)}), FloraConfig(r=2, target_modules=["layer"]))
        twin = copy.deepcopy(model.base_model.model.layer)
        assert type(twin) is type(model.base_model.model.layer)
        assert type(twin.base_layer) is nn.Linear

    def test_not_accelerates_hook_on_the_base_layer(self):
        model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(4, 6)}), FloraConfig(r=2, target_modules=["layer"]))
        layer = model.base_model.model.layer
        add_hook_to_module(layer.base_layer, ModelHook())
        assert remove_hook_from_module(layer) is layer
        assert "forward" not in vars(layer)
        assert hasattr(layer.base_layer, "_hf_hook")


class TestStatus:
    def test_of_layers_and_model(self):
        model, layer, _, _ = attach("attention", torch.float32, scales=(1.0, 2.0))
        (status,) = model.get_layer_status()
        assert (status.name, status.module_type) == ("model.layer", "flora.MultiheadAttention")
        assert status.available_adapters == ["first", "second"]
        assert status.requires_grad == {"first": True, "second": False}
        layer.merge()
        status = model.get_model_status()
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["first"], ["first"])
        assert status.trainable_params == sum(p.numel() for n, p in model.named_parameters() if ".first." in n)

    def test_hotswapping_is_loras_alone(self, tmp_path):
        model, layer, _, _ = attach("linear", torch.float32)
        model.save_pretrained(tmp_path)
        before = layer.get_delta_weight("first").clone()
        with pytest.raises(ValueError, match="Hotswapping only supports LORA but FLORA was passed"):
            hotswap_adapter(model, tmp_path / "first", adapter_name="first")
        assert torch.equal(layer.get_delta_weight("first"), before)


class Block(nn.Module):
    """Parameters of its own, and around other modules."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.gamma * self.lin(self.batch_norm(self.norm(x)))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_parameters": ["norm.weight"]}, {"target_parameters": ["gamma"]}),
        ({"target_parameters": ["gamma"]}, {"target_parameters": ["norm.weight"]}),
        ({"target_modules": ["lin"]}, {"target_parameters": ["gamma"]}),
        ({"target_modules": ["lin"]}, {"target_parameters": ["lin.weight"]}),
        ({"target_parameters": ["lin.weight"]}, {"target_modules": ["lin"]}),
        ({"target_modules": ["lin"], "save_batch_norm": True}, {"target_parameters": ["batch_norm.weight"]}),
        ({"target_parameters": ["batch_norm.weight"]}, {"target_modules": ["lin"], "save_batch_norm": True}),
        (
            {"target_parameters": ["gamma"], "target_modules": []},
            {"target_parameters": ["norm.bias"], "save_batch_norm": True},
        ),
    ],
)
def test_nested_layers_are_refused(first, second, together):
    """PEFT would unload the outer one, and lose the other, or not run it at all."""
    base = nn.Sequential(Block(), Block())
    names = list(base.state_dict())
    if together:
        both = {key: [*first.get(key, ()), *second.get(key, ())] for key in ("target_modules", "target_parameters")}
        both["save_batch_norm"] = "save_batch_norm" in (first | second)
        with pytest.raises(ValueError, match=r"inside|holds other targets|adapted as a layer"):
            get_peft_model(base, FloraConfig(**both))
        assert list(base.state_dict()) == names
    else:
        model = get_peft_model(base, FloraConfig(**first))
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=r"inside|not found|which no module has|another adapter has"):
            model.add_adapter("other", FloraConfig(**second))
        assert list(model.state_dict()) == names
        assert list(model.peft_config) == ["default"]
