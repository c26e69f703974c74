"""Weights that no layer stands for are adapted as if the module had W + dW: bare parameters, experts, attention."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from florapeft import FloraConfig, FloraLayer
from florapeft.parameters import FloraParameters, MultiheadAttention


class Bare(nn.Module):
    """Parameters of every order, each of which the output depends on."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.stack = nn.Parameter(torch.randn(3, 8, 5))
        self.kernel = nn.Parameter(torch.randn(4, 5, 2, 3))

    def forward(self, x):
        x = F.linear(x * self.gain, self.matrix)
        x = torch.stack([x @ self.stack[expert] for expert in range(3)], -1)  # (n, 5, 3)
        return F.conv2d(x[:, :, None].expand(-1, -1, 2, -1), self.kernel).flatten(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.bare = Bare()
        self.lin = nn.Linear(4, 2)

    def forward(self, x):
        return self.lin(self.bare(self.norm(x)))


NAMES = ["gain", "matrix", "stack", "kernel"]
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


def config(**given):
    return FloraConfig(**{"r": 2, "target_modules": [], "target_parameters": NAMES, "init_weights": False, **given})


def reference(base, model, x=X, **kwargs):
    """The base model's function with W + dW for its weights, whatever module they are in."""
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, FloraLayer):
            for adapter in layer.active_adapters:
                for weight, delta in layer.delta_weights(adapter).items():
                    weights[f"{name}.{weight}"] = weights[f"{name}.{weight}"] + delta
    return functional_call(base, weights, (x,), kwargs)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class TestBareParameters:
    @pytest.mark.parametrize("route", ["auto", "factored", "dense"])
    @pytest.mark.parametrize("names", [[name] for name in NAMES] + [NAMES, ["norm.weight", "norm.bias"]])
    def test_is_the_module_with_other_weights(self, names, route):
        model = get_peft_model(net(), config(target_parameters=names, scale=0.5))
        model.base_model.set_route(route)
        expected = reference(net(), model)
        assert not torch.equal(expected, net()(X))
        assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(expected.square().sum(), trainable(model).values())
        assert_close(
            torch.autograd.grad(model(X).square().sum(), trainable(model).values()), wanted, rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("start", [True, "released", "variance", "zero_output"])
    def test_starts_at_the_base_and_moves(self, start):
        model = get_peft_model(net(), config(init_weights=start))
        expected = net().requires_grad_(False)(X)
        assert torch.equal(model(X), expected)
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        for _ in range(2):
            model(X).square().sum().backward()
            optimizer.step()
        assert all(not torch.equal(before[name], p) for name, p in trainable(model).items())

    def test_saved_keys_are_pinned(self, tmp_path):
        model = get_peft_model(net(), config())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path)
        assert torch.equal(loaded(X), model(X))
        keys = {key.removeprefix("base_model.model.") for key in model.state_dict() if "flora_" in key}
        names = {"gain": "", "matrix": "01", "stack": "012", "kernel": "012"}  # whole modes have no factor
        assert keys == {f"bare.flora_core.default.{name}.weight" for name in names} | {
            f"bare.flora_factors.default.{name}.{mode}.weight" for name, modes in names.items() for mode in modes
        } - {"bare.flora_factors.default.kernel.2.weight"} | {"bare.flora_factors.default.kernel.3.weight"}

    def test_life(self):
        base = net()
        model = get_peft_model(base, config())
        first = model(X)
        with model.disable_adapter():
            assert_close(model(X), net()(X))
        model.add_adapter("other", config(target_parameters=["stack"], r=1))
        model.set_adapter("other")
        second = model(X)
        assert_close(second, reference(net(), model))
        model.base_model.set_adapter(["default", "other"])
        both = model(X)
        assert_close(both, reference(net(), model), rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        assert_close(model(X), both, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert_close(model(X), both, rtol=1e-4, atol=1e-4)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(X), model(X))
        model.set_adapter("default")
        model.delete_adapter("other")
        assert_close(model(X), first)
        merged = model.merge_and_unload()
        assert_close(merged(X), first, rtol=1e-4, atol=1e-4)
        assert list(merged.state_dict()) == list(net().state_dict())
        assert not any(isinstance(module, FloraLayer) for module in merged.modules())

    def test_unloading_restores_the_base(self):
        assert torch.equal(get_peft_model(net(), config()).unload()(X), net()(X))

    def test_ranks(self):
        model = get_peft_model(net(), config(r=3, rank_pattern={"stack": [2, 4, 1], "bare.kernel": 1}))
        core = model.base_model.model.bare.flora_core["default"]
        shapes = {name: tuple(core[name].weight.shape) for name in NAMES}
        assert shapes == {"gain": (6,), "matrix": (3, 3), "stack": (2, 4, 1), "kernel": (1, 1, 1, 1)}

    def test_scales(self):
        model = get_peft_model(net(), config(scale=2.0, scale_pattern={"gain": 0.0}))
        layer = model.base_model.model.bare
        assert torch.count_nonzero(layer.get_delta_weight("default", "gain")) == 0
        before = layer.get_delta_weight("default", "stack")
        layer.set_scale("default", 3.0)
        assert_close(layer.get_delta_weight("default", "stack"), 3 * before)
        assert_close(model(X), reference(net(), model), rtol=1e-4, atol=1e-4)
        layer.unscale_layer()
        assert_close(layer.get_delta_weight("default", "stack"), before)

    def test_budget(self, tmp_path):
        model = get_peft_model(net(), config(budget=100, r=8, target_parameters=["matrix", "stack"]))
        assert sum(p.numel() for p in trainable(model).values()) <= 100
        assert set(model.peft_config["default"].ranks) == {"bare.matrix", "bare.stack"}
        assert model.peft_config["default"].ranks["bare.stack"][0] == 3  # of the matrices, which stay apart
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(X), model(X))

    def test_a_weight_asked_of_the_layer_comes_with_its_update(self):
        layer = get_peft_model(net(), config()).base_model.model.bare
        expected = layer.get_base_layer().matrix + layer.get_delta_weight("default", "matrix")
        assert_close(layer.matrix.dense(), expected)
        assert_close(F.linear(X, layer.matrix), F.linear(X, expected), rtol=1e-4, atol=1e-4)
        layer.merge()
        assert isinstance(layer.matrix, nn.Parameter)
        assert_close(layer.matrix, expected)
        layer.enable_adapters(False)
        assert_close(layer.matrix, net().bare.matrix)
        assert not layer.merged

    @pytest.mark.parametrize("kind", ["called", "iterated", "indexed"])
    def test_of_a_module_that_holds_others_in_order(self, kind):
        class Stack(nn.Sequential):
            def __init__(self):
                super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
                self.gain = nn.Parameter(torch.randn(6, 6))

            def forward(self, x):
                return super().forward(x @ self.gain)

        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.stack = Stack()

            def forward(self, x):
                if not self.stack or kind == "called":
                    return self.stack(x)
                x = x @ self.stack.gain
                for layer in self.stack if kind == "iterated" else map(self.stack.__getitem__, range(len(self.stack))):
                    x = layer(x)
                return x

        base = Around()
        before = base(X)
        model = get_peft_model(base, config(target_parameters=["stack.gain"]))
        expected = model(X)
        assert not torch.allclose(expected, before)
        assert base.stack[1] in base.stack
        model.merge_adapter()
        assert_close(model(X), expected)
        with model.disable_adapter():
            assert_close(model(X), before)

    def test_what_holds_no_others_is_still_true(self):
        layer = get_peft_model(net(), config()).base_model.model.bare
        assert layer
        with pytest.raises(TypeError, match=r"object of type 'Bare' has no len\(\)"):
            len(layer)

    def test_which_delta_weight(self):
        layer = get_peft_model(net(), config()).base_model.model.bare
        with pytest.raises(
            ValueError, match=r"has updates of \['gain', 'kernel', 'matrix', 'stack'\]: name one, got None"
        ):
            layer.get_delta_weight("default")

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_in_a_module_that_checkpoints_itself(self, reentrant):
        """transformers runs such a layer once more in the backward pass: with the update, too."""

        class Layer(GradientCheckpointingLayer):
            def __init__(self):
                super().__init__()
                self.gain = nn.Parameter(torch.randn(6))

            def forward(self, x):
                return (x * self.gain).tanh()

        base = nn.ModuleDict({"layer": Layer()})
        model = get_peft_model(base, config(target_parameters=["gain"])).train()
        layer, x = model.base_model.model["layer"], X.clone().requires_grad_()
        expected = torch.autograd.grad(layer(x).sum(), [x, *trainable(model).values()])
        inner = layer.get_base_layer()
        inner.gradient_checkpointing = True
        inner._gradient_checkpointing_func = lambda *args: torch.utils.checkpoint.checkpoint(
            *args, use_reentrant=reentrant
        )
        layer(x).sum().backward()
        assert_close([x.grad, *(p.grad for p in trainable(model).values())], list(expected))

    def test_half_precision_base(self):
        model = get_peft_model(net().to(torch.bfloat16), config())
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        x = X.to(torch.bfloat16)
        assert model(x).dtype == torch.bfloat16
        assert_close(model(x).float(), reference(net(), model), rtol=0.1, atol=0.2)


class TestRefused:
    def refused(self, message, base=None, **given):
        base = net() if base is None else base
        state, types = copy.deepcopy(base.state_dict()), [type(module) for module in base.modules()]
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config(**given))
        assert [type(module) for module in base.modules()] == types
        assert_close(base.state_dict(), state)

    @pytest.mark.parametrize(
        ("message", "given"),
        [
            (
                r"target_parameters has 'stak', which no module has\. Did you mean .*stack",
                {"target_parameters": ["stak"]},
            ),
            (
                r"target_modules=\['lin'\], target_parameters=\['lin.weight'\] matches 1 target that FLoRA cannot "
                r"adapt: lin.weight \(its module lin is adapted as a layer",
                {"target_modules": ["lin"], "target_parameters": ["lin.weight"]},
            ),
        ],
    )
    def test_names(self, message, given):
        self.refused(message, **given)

    def test_of_the_outermost_module(self):
        self.refused(
            "'matrix', a parameter of the outermost module, which PEFT cannot wrap",
            Bare(),
            target_parameters=["matrix"],
        )

    def test_of_a_module_that_holds_targets(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.gain, self.lin = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

        message = r"block.gain \(its module holds other targets, as block.lin"
        self.refused(message, nn.ModuleDict({"block": Block()}), target_modules=["lin"], target_parameters=["gain"])

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (torch.zeros(3, 4, dtype=torch.int8), r"it is quantised \(stored as torch.int8\)"),
            (torch.tensor(1.0), "it is a single number"),
            (torch.zeros(3, 0, 4), r"it is empty \(shape \(3, 0, 4\)\)"),
        ],
    )
    def test_of_another_nature(self, value, reason):
        base = net()
        base.bare.odd = nn.Parameter(value, requires_grad=False)
        self.refused(rf"bare.odd \({reason}\)", base, target_parameters=["odd"])

    @pytest.mark.parametrize("cls", [nn.ParameterDict, nn.ParameterList])
    def test_entries_of_what_is_never_called(self, cls):
        base, name = net(), "w" if cls is nn.ParameterDict else "0"
        values = {"w": torch.zeros(3, 4)} if cls is nn.ParameterDict else [torch.zeros(3, 4)]
        base.held = cls(values).requires_grad_(False)
        reason = f"it is an entry of a {cls.__name__}, which is read without being called"
        self.refused(rf"held.{name} \({reason}\)", base, target_parameters=[f"held.{name}"])

    def test_names_that_peft_would_confuse(self):
        base = net()
        base.tack = nn.Linear(2, 2)
        self.refused("'tack' is also the end of what the adapter of 'stack' is called", base, modules_to_save=["tack"])
        with pytest.raises(ValueError, match="adapter name 'stack' can be a part of the keys"):
            get_peft_model(net(), config(), adapter_name="stack")


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
SIZES |= {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)
    ),
    "GPT-OSS": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **EXPERTS, head_dim=8)),
    "Llama 4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24, head_dim=8)
    ),
    "DeepSeek-V3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_group=2, topk_group=1,
            first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
}  # fmt: skip
IDS = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))


def moe(name, implementation="eager"):
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    if name != "Llama 4":  # whose class has the one way only
        model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("name", MODELS)
class TestExperts:
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_stacks_are_one_update_of_order_three(self, name, implementation):
        if name == "Llama 4" and implementation != "eager":
            pytest.skip("Llama 4's experts are computed in one way only")
        model = get_peft_model(moe(name, implementation), FloraConfig(r=3, target_modules="all-weights"))
        assert torch.equal(model(IDS).logits, moe(name, implementation)(IDS).logits)
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.3)
        results = []
        for route in ("auto", "dense"):
            model.base_model.set_route(route)
            logits = model(IDS).logits
            results.append((logits, torch.autograd.grad(logits.square().sum(), trainable(model).values())))
        assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
        assert_close(model.merge_and_unload()(IDS).logits, results[0][0], rtol=1e-3, atol=1e-4)

    def test_targets_and_reload(self, name, tmp_path):
        model = get_peft_model(moe(name), FloraConfig(r=3, target_modules="all-weights", init_weights=False))
        stacks = {n: m for n, m in model.base_model.model.named_modules() if type(m) is FloraParameters}
        assert len(stacks) == 1
        (experts,) = stacks.values()
        assert set(experts.weight_names.values()) == {"gate_up_proj", "down_proj"}
        assert {tuple(tucker.rank) for tucker in experts.tuckers("default").values()} == {(3, 3, 3)}
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(moe(name), tmp_path)(IDS).logits, model(IDS).logits)

    def test_alone(self, name, tmp_path):
        """Without `target_modules`, whether or not PEFT has a default for the model."""
        given = FloraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_weights=False)
        model = get_peft_model(moe(name), given)
        assert {type(module) for module in model.modules() if isinstance(module, FloraLayer)} == {FloraParameters}
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(moe(name), tmp_path)(IDS).logits, model(IDS).logits)

    def test_left_out(self, name):
        experts = "feed_forward.experts" if name == "Llama 4" else "experts"
        given = FloraConfig(r=3, target_modules="all-weights", exclude_modules=[experts])
        model = get_peft_model(moe(name), given)
        assert not any(isinstance(module, FloraParameters) for module in model.modules())


ATTENTION = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 10},
    "bias in the sequence": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("name", ATTENTION)
class TestAttention:
    def build(self, name):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2, **ATTENTION[name])
        x = [torch.randn(3, 3, size) for size in (8, module.kdim, module.vdim)]
        return nn.ModuleDict({"attn": module}).eval(), x

    @pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
    def test_is_attention_with_other_weights(self, name, mode):
        base, x = self.build(name)
        expected_base = base["attn"](*x)[0]
        model = get_peft_model(base, FloraConfig(r=3, target_modules="all-weights", init_weights=False))
        model.train(mode == "train")
        layer = model.base_model.model["attn"]
        assert type(layer) is MultiheadAttention
        weights = {
            f"{weight}": layer.get_base_layer().get_parameter(weight) + delta
            for weight, delta in layer.delta_weights("default").items()
        }
        assert "out_proj.weight" in weights
        assert len(weights) == (4 if name == "separate" else 2)
        expected = functional_call(layer.get_base_layer(), weights, tuple(x))
        with torch.set_grad_enabled(mode != "no_grad"):
            result = layer(*x)
        assert_close(result, expected)
        assert not torch.allclose(result[0], expected_base)
        merged = model.merge_and_unload()
        assert_close(merged["attn"](*x), expected)

    def test_every_tensor_moves_and_comes_back(self, name, tmp_path):
        base, x = self.build(name)
        model = get_peft_model(base, FloraConfig(r=3, target_modules=["attn"]))
        layer = model.base_model.model["attn"]
        for _ in range(2):
            layer(*x)[0].square().sum().backward()
            for parameter in trainable(model).values():
                parameter.data -= 0.1 * parameter.grad
        assert all(torch.count_nonzero(p.grad) for p in trainable(model).values())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.build(name)[0], tmp_path)
        assert_close(loaded.base_model.model["attn"](*x), layer(*x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("route", ["auto", "dense"])
@pytest.mark.parametrize("targets", ["all-weights", "all-linear", ["linear1", "linear2"], ["self_attn"]])
@pytest.mark.parametrize("padding", [False, True])
def test_encoder_layers_take_no_path_around_the_adapter(padding, targets, route):
    """torch's fused inference path of nn.TransformerEncoderLayer reads the weights; padding is cut out, by nesting."""
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    model = get_peft_model(base, FloraConfig(r=2, target_modules=targets, init_weights=False))
    model.base_model.set_route(route)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padding
    expected = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        assert_close(model.eval()(x, src_key_padding_mask=mask)[~mask], expected[~mask], rtol=1e-4, atol=1e-4)
