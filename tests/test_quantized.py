"""Adapters over quantised linear layers: the backends that run on a CPU for real, the others by a stand-in."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import florapeft.layer
from florapeft import FloraConfig, allocate, initialize_from_gradients, plan
from florapeft.contract import ROUTES
from florapeft.kinds import Linear, has_own_forward
from florapeft.target_ranks import count_base_parameters
from florapeft.targets import find_targets


def bnb_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    quantized = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    quantized.load_state_dict(linear.state_dict())
    return quantized.to("cpu")


def bnb_4bit(kind, **options):
    def quantize(linear):
        bnb = pytest.importorskip("bitsandbytes")
        sizes = (linear.in_features, linear.out_features)
        quantized = bnb.nn.Linear4bit(*sizes, quant_type=kind, compute_dtype=linear.weight.dtype, **options)
        quantized.load_state_dict(linear.state_dict())
        return quantized.to("cpu")

    return quantize


def hqq(nbits):
    def quantize(linear):
        module = pytest.importorskip("hqq.core.quantize")
        config = module.BaseQuantizeConfig(nbits=nbits, group_size=64)
        return module.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")

    return quantize


def torchao_config(name):
    return getattr(pytest.importorskip("torchao.quantization"), name)()


def torchao(name):
    def quantize(linear):
        config = torchao_config(name)
        pytest.importorskip("torchao.quantization").quantize_(linear, config)
        return linear

    quantize.config = name
    return quantize


# name: what quantises an nn.Linear, and the relative error that its rounding makes at most, of weights and of outputs
BACKENDS = {
    "bnb 8bit": (bnb_8bit, 0.015),
    "bnb nf4": (bnb_4bit("nf4", compress_statistics=False), 0.12),
    "bnb nf4 double": (bnb_4bit("nf4"), 0.12),
    "bnb fp4": (bnb_4bit("fp4"), 0.15),
    "bnb nf4 in bfloat16 storage": (bnb_4bit("nf4", quant_storage=torch.bfloat16), 0.12),
    "hqq 4bit": (hqq(4), 0.1),
    "hqq 8bit": (hqq(8), 0.015),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 0.015),
    "torchao int8 dynamic": (torchao("Int8DynamicActivationInt8WeightConfig"), 0.02),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), 0.05),
}
every_backend = pytest.mark.parametrize("name", BACKENDS)


def build(name, dtype=torch.float32):
    """Two quantised layers and a plain one; the same at every call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
    net.requires_grad_(False)
    quantize = BACKENDS[name][0]
    net[0], net[2] = quantize(net[0]), quantize(net[2])
    for layer in (net[0], net[2]):  # see TestRepacking
        layer.support_avx512bf16_for_cpu = False
    if name.startswith("torchao"):  # what transformers puts on the models that it loads
        net.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(torchao_config(quantize.config)))
    return net.eval()


def inputs(dtype=torch.float32):
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def attach(net, **config):
    """A PeftModel; a random update of about the weights' size unless said otherwise."""
    defaults = {"r": 4, "target_modules": ["0", "2"], "init_weights": False, "scale": 0.3}
    return get_peft_model(net, FloraConfig(**{**defaults, **config})).eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear) and m.quantization_backend is not None]


def dequantized(layer):
    return layer.quantization_backend.get_base_weight(layer.get_base_layer()).detach().clone()


def bits(model):
    """Every tensor of the base, those inside of tensors and of the quantisation's state too."""
    found = {}

    def collect(key, value):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                collect(f"{key}.{name}", getattr(value, name))
        elif isinstance(value, torch.Tensor):
            found[key] = value.detach().clone()

    for key, value in model.state_dict().items():
        if "flora_" not in key:
            collect(key, value)
    assert len(found) >= 6
    return found


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        first_bits, second_bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (value, second[key]))
        assert torch.equal(first_bits, second_bits), key


def relative_error(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


@every_backend
class TestAttach:
    @pytest.mark.parametrize("targets", ["all-weights", "all-linear", ["0", "2"]])
    def test_changes_nothing_at_first(self, name, targets):
        net = build(name)
        before = net(inputs())
        model = attach(net, target_modules=targets, init_weights=True)
        first, second = layers(model)
        assert torch.equal(model(inputs()), before)
        assert [(layer.out_features, layer.in_features) for layer in (first, second)] == [(128, 64), (64, 128)]
        assert [f.shape for f in first.tucker("default").factors] == [(128, 4), (64, 4)]
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "flora_" in n)
        assert f"quantization_backend='{first.quantization_backend.backend_name}'" in repr(first)

    def test_adapters_have_the_dtype_of_the_computation_without_autocast(self, name):
        net = build(name, torch.bfloat16)
        config = FloraConfig(target_modules=["0"], r=4, init_weights=False)
        model = get_peft_model(net, config, autocast_adapter_dtype=False).eval()
        dtypes = {p.dtype for n, p in model.named_parameters() if "flora_" in n}
        assert dtypes == {torch.float32 if name == "bnb 8bit" else torch.bfloat16}  # int8 layers have no such dtype
        assert model(inputs(torch.bfloat16)).dtype == torch.bfloat16

    def test_a_share_of_the_model_counts_logical_sizes(self, name):
        net = build(name)
        logical = 64 * 128 + 128 + 128 * 64 + 64 + 64 * 3 + 3
        if name.startswith("hqq"):
            logical -= 128 + 64  # HQQ's biases are no parameters
        assert count_base_parameters(net) == logical
        assert count_base_parameters(attach(net)) == logical


@every_backend
class TestTraining:
    def test_lowers_the_loss_and_moves_every_tensor(self, name):
        model = attach(build(name), target_modules="all-weights", init_weights=True).train()
        base, before = bits(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        assert len(before) == 8  # three of each quantised layer, two of the last one, of which one mode is whole
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        target, losses = torch.randn(6, 3), []
        for _ in range(30):
            loss = F.mse_loss(model(inputs()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        after = dict(model.named_parameters())
        assert not [n for n, p in before.items() if torch.equal(p, after[n])]
        assert_same_bits(bits(model), base)

    def test_gradients_are_those_over_the_dequantised_weight(self, name):
        model = attach(build(name), target_modules=["0"])
        (layer,) = layers(model)
        core, (left, right) = layer.tucker("default")
        x, cotangent = inputs().requires_grad_(), torch.randn(6, 128)
        parameters = [core, left, right]
        mine = torch.autograd.grad(layer(x), [*parameters, x], cotangent)
        # cotangentᵀ @ x is the gradient of W + dW, whatever W is
        update = 0.3 * left @ core @ right.T
        theirs = torch.autograd.grad(F.linear(x, dequantized(layer) + update), [*parameters, x], cotangent)
        for ours, reference in zip(mine[:3], theirs[:3], strict=True):
            assert_close(ours, reference, rtol=1e-5, atol=1e-4)
        if name == "torchao int8 dynamic":
            # torchao 0.18's product has no gradient of its input: the adapter's part is all there is.
            (reference,) = torch.autograd.grad(F.linear(x, update), x, cotangent)
            assert_close(mine[3], reference, rtol=1e-5, atol=1e-4)
        else:
            assert relative_error(mine[3], theirs[3]) < (1e-3 if "8bit" in name else 1e-5)


@every_backend
class TestLife:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_save_and_load(self, name, low_cpu_mem_usage, tmp_path):
        model = attach(build(name))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(inputs()), model(inputs()))

    def test_disabled(self, name):
        net = build(name)
        before = net(inputs())
        model = attach(net)
        assert not torch.equal(model(inputs()), before)
        with model.disable_adapter():
            assert torch.equal(model(inputs()), before)

    def test_two_adapters_add_up(self, name):
        model = attach(build(name), target_modules=["0"])
        model.add_adapter("second", FloraConfig(target_modules=["0"], r=2, init_weights=False))
        (layer,) = layers(model)
        x = inputs()
        base = layer.get_base_layer()(x)
        updates = {n: F.linear(x, layer.get_delta_weight(n)) for n in ("default", "second")}
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            for route in ("auto", *ROUTES):
                model.base_model.set_route(route)
                assert_close(layer(x), base + sum(updates[n] for n in active), rtol=1e-4, atol=1e-4)

    def test_mixed_batches(self, name):
        model = attach(build(name))
        model.add_adapter("second", FloraConfig(target_modules=["0", "2"], r=2, init_weights=False))
        x = inputs()
        names = ["default", "second", "__base__", "second", "default", "__base__"]
        mixed = model(x, adapter_names=names)
        alone = {}
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            alone[adapter] = model(x)
        with model.disable_adapter():
            alone["__base__"] = model(x)
        assert_close(mixed, torch.stack([alone[n][i] for i, n in enumerate(names)]), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, name, dtype):
        model, exact = attach(build(name, dtype)), attach(build(name))
        assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "flora_" in n)
        exact.load_state_dict({k: v for k, v in model.state_dict().items() if "flora_" in k}, strict=False)
        y = model(inputs(dtype))
        assert y.dtype == dtype
        # Rounding to bfloat16 first, some weights are quantised to the neighbouring value.
        assert relative_error(y.float(), exact(inputs())) < 0.07
        y.float().square().mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_autocast(self, name):
        model = attach(build(name))
        exact = model(inputs())
        with torch.autocast("cpu", torch.bfloat16):
            y = model(inputs())
        assert relative_error(y.float(), exact) < 0.03

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies(self, name, how):
        if how == "pickle" and not name.startswith(("bnb 8bit", "hqq")):
            pytest.skip("the backend's own weights do not pickle, or lose their class")
        model = attach(build(name))
        before = bits(model)
        y = model(inputs())
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(other(inputs()), y)
        other.merge_adapter()
        assert_same_bits(bits(model), before)
        if how == "deepcopy":
            other = copy.deepcopy(other)
        other.unmerge_adapter()
        assert torch.equal(other(inputs()), y)


@every_backend
class TestMerge:
    def test_there_and_back(self, name):
        error = BACKENDS[name][1]
        model = attach(build(name))
        bases = [layer.get_base_layer() for layer in layers(model)]
        adapted, before = model(inputs()), bits(model)
        exact = [dequantized(layer) + layer.get_delta_weight("default") for layer in layers(model)]
        model.merge_adapter()
        for layer, weight in zip(layers(model), exact, strict=True):
            assert relative_error(dequantized(layer), weight) < error
        assert relative_error(model(inputs()), adapted) < 2 * error
        assert not torch.equal(model(inputs()), adapted)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)
        assert [layer.get_base_layer() for layer in layers(model)] == bases
        assert torch.equal(model(inputs()), adapted)

    def test_before_the_first_call(self, name):
        model, other = attach(build(name)), attach(build(name))
        model.merge_adapter()
        assert all(layer.merged for layer in layers(model))
        model.unmerge_adapter()
        assert_same_bits(bits(model), bits(other))
        assert torch.equal(model(inputs()), other(inputs()))

    def test_again_and_again(self, name):
        model = attach(build(name))
        adapted, before = model(inputs()), bits(model)
        model.merge_adapter()
        merged = bits(model)
        for _ in range(2):
            model.unmerge_adapter()
            model.to("cpu")  # bitsandbytes quantises then what it takes for not quantised
            assert_same_bits(bits(model), before)
            assert torch.equal(model(inputs()), adapted)
            model.merge_adapter()
            assert_same_bits(bits(model), merged)

    def test_several(self, name):
        model = attach(build(name))
        model.add_adapter("second", FloraConfig(target_modules=["0", "2"], r=2, init_weights=False, scale=0.3))
        model.base_model.set_adapter(["default", "second"])
        adapted, before = model(inputs()), bits(model)
        model.merge_adapter()
        assert [layer.merged_adapters for layer in layers(model)] == [["default", "second"]] * 2
        assert relative_error(model(inputs()), adapted) < 3 * BACKENDS[name][1]
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)

    def test_keeps_bias_mode_and_hooks(self, name):
        model = attach(build(name))
        layer = layers(model)[0]
        bias, calls = layer.get_base_layer().bias.detach().clone(), []
        handle = layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
        model.merge_adapter()
        model(inputs())
        assert torch.equal(layer.get_base_layer().bias, bias)
        model.train().unmerge_adapter()
        assert layer.get_base_layer().training
        model(inputs())
        handle.remove()
        model(inputs())
        assert len(calls) == 2

    def test_disabling_unmerges(self, name):
        net = build(name)
        plain = net(inputs())
        model = attach(net)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(inputs()), plain)

    def test_and_unload(self, name):
        model = attach(build(name))
        adapted, kind = model(inputs()), type(layers(model)[0].get_base_layer())
        net = model.merge_and_unload()
        assert [type(net[i]) for i in (0, 2)] == [kind, kind]
        assert relative_error(net(inputs()), adapted) < 2 * BACKENDS[name][1]

    def test_unload(self, name):
        net = build(name)
        plain, before = net(inputs()), bits(net)
        net = attach(net).unload()
        assert_same_bits(bits(net), before)
        assert torch.equal(net(inputs()), plain)

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_safe_merge_refuses_before_any_layer_is_touched(self, name, merge):
        model = attach(build(name))
        before = bits(model)
        layers(model)[-1].tucker("default").core.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights. The adapter default seems"):
            getattr(model, merge)(safe_merge=True)
        assert_same_bits(bits(model), before)
        assert not any(layer.merged for layer in layers(model))

    def test_safe_merge(self, name):
        model, other = attach(build(name)), attach(build(name))
        model.merge_adapter(safe_merge=True)
        other.merge_adapter()
        assert_same_bits(bits(model), bits(other))


class TestRepacking:
    """bitsandbytes repacks 4-bit weights in eval mode on CPUs with AVX512-BF16, for inference alone."""

    @staticmethod
    def layer():
        linear = bnb_4bit("nf4")(nn.Linear(64, 128).requires_grad_(False)).eval()
        if not linear.support_avx512bf16_for_cpu:
            pytest.skip("this CPU has no AVX512-BF16")
        return nn.Sequential(linear)

    def test_is_undone_and_kept_from_happening(self):
        net = self.layer()
        exact = net.train()(inputs())
        packed = net.eval()(inputs())
        assert net[0].weight.quant_state.packing_format_for_cpu
        model = attach(net, target_modules=["0"], init_weights=True)
        for training in (False, True, False):
            assert relative_error(model.train(training)(inputs()), exact) < 0.005
            assert not net[0].weight.quant_state.packing_format_for_cpu
        assert relative_error(packed, exact) < 0.02

    def test_gradients_and_merging_after_eval(self):
        model = attach(self.layer(), target_modules=["0"])
        (layer,) = layers(model)
        weight, x = dequantized(layer), inputs().requires_grad_()
        adapted = model.eval()(inputs())
        (gradient,) = torch.autograd.grad(model.train()(x).sum(), x)
        assert relative_error(gradient, (weight + layer.get_delta_weight("default")).sum(0).expand_as(x)) < 1e-5
        model.eval().merge_adapter()
        assert relative_error(model(inputs()), adapted) < 0.12

    @pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
    def test_happens_again_when_the_adapter_is_gone(self, unload):
        net = getattr(attach(self.layer(), target_modules=["0"]), unload)()
        net(inputs())
        assert net[0].weight.quant_state.packing_format_for_cpu


class Packed(nn.Module):
    """Stands for the linear layers of a backend without CPU kernels; its packed weight can only be multiplied with."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 100).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) / 100, self.bias)


class TestForwardOnly:
    @pytest.fixture
    def net(self, monkeypatch):
        resolve = florapeft.layer.resolve_quantization_backend
        monkeypatch.setattr(
            florapeft.layer,
            "resolve_quantization_backend",
            lambda module, **k: (
                ForwardOnlyQuantizationBackend("packed") if isinstance(module, Packed) else resolve(module, **k)
            ),
        )
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), Packed(nn.Linear(128, 64))).eval()

    @pytest.mark.parametrize("targets", ["all-weights", "all-linear", ["0", "2"]])
    def test_attaches_and_trains(self, net, targets):
        before = net(inputs())
        model = attach(net, target_modules=targets, init_weights=True)
        assert torch.equal(model(inputs()), before)
        assert count_base_parameters(model) == 2 * 64 * 128 + 128
        (layer,) = layers(model)
        assert layer.delta_weights("default")["weight"].shape == (64, 128)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model(inputs()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_refuses_to_merge_before_any_layer_is_changed(self, net, merge, safe_merge):
        weight = net[0].weight.detach().clone()
        model = attach(net)
        adapted = model(inputs())
        with pytest.raises(ValueError, match=r"^cannot merge into a layer quantised with packed, whose weight cannot"):
            getattr(model, merge)(safe_merge=safe_merge)
        assert torch.equal(net[0].get_base_layer().weight, weight)
        assert torch.equal(model(inputs()), adapted)

    def test_merges_adapters_of_other_layers(self, net):
        model = attach(net)
        model.add_adapter("second", FloraConfig(target_modules=["0"], r=2, init_weights=False))
        model.set_adapter("second")
        adapted = model(inputs())
        model.merge_adapter()
        assert_close(model(inputs()), adapted)
        with pytest.raises(ValueError, match="cannot merge into a layer quantised with packed"):
            model.merge_adapter(adapter_names=["default"])

    def test_saves_and_unloads(self, net, tmp_path):
        before = net(inputs())
        model = attach(net)
        adapted = model(inputs())
        model.save_pretrained(tmp_path)
        net = model.unload()
        assert torch.equal(net(inputs()), before)
        assert torch.equal(PeftModel.from_pretrained(net, tmp_path)(inputs()), adapted)


class TestTorchao:
    def test_of_unknown_origin_is_not_merged(self):
        net = build("torchao int8")
        del net.hf_quantizer
        model = attach(net, target_modules=["4", "2"])
        before, adapted = bits(model), model(inputs())
        for merge in (model.merge_adapter, model.merge_and_unload, layers(model)[0].merge):
            with pytest.raises(ValueError, match=r"quantised with torchao .*: only models that transformers loaded"):
                merge()
        assert_same_bits(bits(model), before)
        assert torch.equal(model(inputs()), adapted)

    def test_layers_with_a_forward_of_their_own(self):
        class Router(nn.Linear):
            def forward(self, x):
                return super().forward(x).softmax(-1)

        net = nn.Sequential(torchao("Int8WeightOnlyConfig")(Router(64, 128)))
        assert has_own_forward(net[0])
        model = attach(net, target_modules=["0"])
        (layer,) = layers(model)
        logits = F.linear(inputs(), dequantized(layer) + layer.get_delta_weight("default"), net[0].bias)
        assert_close(model(inputs()), logits.softmax(-1), rtol=1e-4, atol=1e-5)
        assert_close(model(inputs(), adapter_names=["default"] * 6), logits.softmax(-1), rtol=1e-4, atol=1e-5)

    def test_embeddings_are_left_out(self):
        quantization = pytest.importorskip("torchao.quantization")
        net = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 3))
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8)
        quantization.quantize_(net, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
        assert [t.name for t in find_targets(net, FloraConfig(target_modules="all-weights"))] == ["1"]
        assert count_base_parameters(net) == 640 + 195
        with pytest.raises(ValueError, match=r"cannot adapt: 0 \(its weight is quantised, and it is no linear layer\)"):
            attach(net, target_modules=["0"])

    def test_attention_is_left_out(self):
        net = nn.Sequential(nn.MultiheadAttention(64, 4))
        net[0].out_proj = torchao("Int8WeightOnlyConfig")(nn.Linear(64, 64))
        with pytest.raises(ValueError, match="the weight of its out_proj is quantised"):
            attach(net, target_modules=["0"])


@every_backend
def test_a_quantised_weight_that_the_module_around_reads_is_refused(name):
    """As Mamba's projections are: W + dW would add to packed numbers."""

    class Read(nn.Module):
        def __init__(self, proj):
            super().__init__()
            self.proj = proj

        def forward(self, x):
            return nn.functional.linear(x, self.proj.weight)

    net = nn.Sequential(Read(build(name)[0]), nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"0.proj \(its weight is quantised, and the module around it computes with it\)"
    ):
        attach(net, target_modules=["proj"])
    assert attach(net, target_modules="all-weights").targeted_module_names == ["1"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unknown_quantisation_is_refused(dtype):
    net = nn.Sequential(nn.Linear(6, 8))
    net[0].weight = nn.Parameter(net[0].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"its weight has dtype {dtype}, of a quantisation that PEFT does not know"):
        attach(net, target_modules=["0"])


def four_bit():
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def int8():
    return TorchAoConfig(torchao_config("Int8WeightOnlyConfig"))


# peft.prepare_model_for_kbit_training still calls it so.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("config", [four_bit, eight_bit, int8])
class TestTransformers:
    """Models that transformers quantises while loading (with HQQ, transformers 5.23 cannot)."""

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        path = tmp_path_factory.mktemp("llama")
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 2}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(path)
        return path

    @staticmethod
    def load(checkpoint, config):
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config(), device_map="cpu").eval()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_whole_life(self, config, reentrant, checkpoint, tmp_path):
        checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = prepare_model_for_kbit_training(self.load(checkpoint, config), **checkpointing)
        ids = torch.randint(64, (2, 12))
        before = model(ids).logits
        model = get_peft_model(model, FloraConfig(target_modules="all-linear", r=4))
        assert len(layers(model)) == 14
        if config is not four_bit:  # before, it had run repacked
            assert torch.equal(model(ids).logits, before)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        model.train()
        losses = []
        for _ in range(15):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]

        adapted = model.eval()(ids).logits
        model.save_pretrained(tmp_path)
        base = prepare_model_for_kbit_training(self.load(checkpoint, config))
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(ids).logits, adapted)

        before = bits(model)
        model.merge_adapter()
        assert relative_error(model(ids).logits, adapted) < (0.2 if config is four_bit else 0.03)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)
        assert torch.equal(model(ids).logits, adapted)

        merged = loaded.merge_and_unload()
        assert not [m for m in merged.modules() if isinstance(m, Linear)]
        assert relative_error(merged(ids).logits, adapted) < (0.2 if config is four_bit else 0.03)


class TestGradients:
    """The gradient of a quantised weight, which autograd does not make, from the layer's input and output gradient."""

    @staticmethod
    def loss(model, x):
        return model(x).square().sum()

    def reference(self, net, name):
        """The leading right singular vectors of the gradients of the same network with its weights read back."""
        plain = copy.deepcopy(build(name))
        for n, layer in zip((0, 2), layers(net), strict=True):
            weight = dequantized(layer).float()
            plain[n] = nn.Linear(weight.shape[1], weight.shape[0])
            plain[n].weight.data, plain[n].bias.data = weight, layer.get_base_layer().bias.detach().float()
        plain.requires_grad_(True)
        self.loss(plain, inputs()).backward()
        return [torch.linalg.svd(plain[n].weight.grad, full_matrices=False).Vh for n in (0, 2)]

    @every_backend
    def test_ranks_and_start(self, name):
        net, config = build(name), FloraConfig(budget=0.1, init_weights="gradient", target_modules=["0", "2"])
        before = net(inputs())
        assert [layer.shape for layer in plan(net, config, inputs=inputs()).layers] == [(128, 64), (64, 128)]
        solved = allocate(net, config, [inputs()], self.loss)
        assert torch.equal(net(inputs()), before)
        model = get_peft_model(net, solved)
        again = attach(build(name), r=3, init_weights="gradient")
        initialize_from_gradients(again, [inputs()], self.loss)
        # The gradient of torchao's dynamic int8 to its input is missing, and so is that of what comes before.
        places = [1] if "dynamic" in name else [0, 1]
        for adapted in (model, again):
            for place in places:
                factor = layers(adapted)[place].tucker("default").factors[1].detach()
                overlap = torch.linalg.svdvals(self.reference(adapted, name)[place][:3] @ factor)
                assert_close(overlap, torch.ones_like(overlap), atol=2e-2, rtol=0)
