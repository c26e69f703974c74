"""PEFT's behaviours, on a network with every kind of layer and on small transformers models."""

import copy
import importlib
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import florapeft
from florapeft import FloraConfig, FloraLayer

second_time = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

BODY = ["embed", "conv", "up", "stored", "lin"]


class Net(nn.Module):
    """Every class of layer that is adapted."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.stored = Conv1D(8, 6)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.up(torch.relu(self.conv(self.embed(x).mT))).mT.contiguous()  # Conv1D takes views of it
        return self.head(torch.relu(self.lin(self.stored(x))).mean(1))


def net():
    torch.manual_seed(0)
    return Net()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


BASES = {"net": net, "bert": bert, "gpt2": gpt2}
X = torch.tensor([[1, 5, 0, 8], [3, 3, 2, 0]])


def config(**arguments):
    arguments = {"r": 3, "target_modules": "all-weights", "init_weights": False, **arguments}
    return FloraConfig(**arguments)


def out(model, x=X):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def train(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(X)
        (y if isinstance(y, torch.Tensor) else y.logits).square().sum().backward()
        optimizer.step()


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, FloraLayer)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
class TestLife:
    def test_attaching(self, base):
        expected = out(base())
        model = get_peft_model(base(), config(init_weights=True))
        assert torch.equal(out(model), expected)
        assert trainable(model) == {name for name, _ in model.named_parameters() if "flora_" in name}

    def test_training_moves_the_adapter_alone(self, base):
        model = get_peft_model(base(), config())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == trainable(model)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_saving_and_loading(self, base, low_cpu_mem_usage, tmp_path):
        model = get_peft_model(base(), config(scale=0.7, kernel_r=2))
        train(model)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(out(loaded), out(model))
        assert adapted(loaded) == adapted(model)
        assert trainable(loaded) == set()
        state, reloaded = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
        assert all(torch.equal(state[key], reloaded[key]) for key in state.keys() | reloaded.keys())

    def test_loading_to_train_on(self, base, tmp_path):
        model = get_peft_model(base(), config())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
        assert trainable(loaded) == trainable(model)
        train(model)
        train(loaded)
        assert torch.equal(out(loaded), out(model))

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loading_a_second_adapter(self, base, low_cpu_mem_usage, tmp_path):
        other = get_peft_model(base(), config(r=2))
        other.save_pretrained(tmp_path)
        model = get_peft_model(base(), config())
        first = out(model)
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(out(model), first)
        model.set_adapter("other")
        assert torch.equal(out(model), out(other))
        model.set_adapter("default")
        assert torch.equal(out(model), first)

    def test_disabling(self, base):
        expected = out(base())
        model = get_peft_model(base(), config())
        first = out(model)
        assert not torch.allclose(first, expected)
        with model.disable_adapter():
            assert torch.equal(out(model), expected)
            with model.disable_adapter():
                assert torch.equal(out(model), expected)
            assert torch.equal(out(model), expected)
        assert torch.equal(out(model), first)

    def test_merging(self, base):
        model = get_peft_model(base(), config())
        adapted, plain = out(model), out(base())
        model.merge_adapter()
        assert_close(out(model), adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert_close(out(model), adapted, rtol=1e-4, atol=1e-5)
        model.merge_adapter(safe_merge=True)
        with model.disable_adapter():
            assert_close(out(model), plain, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merge_and_unload(self, base, safe_merge):
        model = get_peft_model(base(), config())
        expected = out(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        fresh = base()
        assert type(merged) is type(fresh)
        assert list(merged.state_dict()) == list(fresh.state_dict())
        assert not adapted(merged)
        assert_close(out(merged), expected, rtol=1e-4, atol=1e-5)

    def test_unload(self, base):
        model = get_peft_model(base(), config())
        plain, fresh = model.unload(), base()
        assert list(plain.state_dict()) == list(fresh.state_dict())
        assert torch.equal(out(plain), out(fresh))

    def test_a_copy_is_its_own(self, base):
        model = get_peft_model(base(), config())
        twin, expected = copy.deepcopy(model), out(model)
        assert torch.equal(out(twin), expected)
        train(twin)
        assert torch.equal(out(model), expected)


class TestCounting:
    def test_what_is_printed(self, capsys):
        get_peft_model(net(), config(r=2, target_modules=["lin"])).print_trainable_parameters()
        base = sum(p.numel() for p in net().parameters())
        assert capsys.readouterr().out == (
            f"trainable params: 36 || all params: {base + 36} || trainable%: {100 * 36 / (base + 36):.4f}\n"
        )

    def test_heads_do_not_count_against_the_budget(self):
        model = get_peft_model(net(), config(budget=100, r=8, target_modules=["lin"], modules_to_save=["head"]))
        assert sum(p.numel() for n, p in model.named_parameters() if "flora_" in n) <= 100
        assert model.base_model.model.lin.tucker("default").rank == (8, 8)  # whole: 64 parameters


class TestSeveralAdapters:
    def test_on_different_layers(self):
        model = get_peft_model(net(), config(target_modules=["lin"]))
        only_lin = out(model)
        model.add_adapter("other", config(target_modules=["conv", "embed"]))
        assert torch.equal(out(model), only_lin)
        assert all(".default." in name for name in trainable(model))
        model.set_adapter("other")
        alone = get_peft_model(net(), config(target_modules=["conv", "embed"]))
        alone.load_state_dict(
            {k.replace(".other.", ".default."): v for k, v in model.state_dict().items()}, strict=False
        )
        assert torch.equal(out(model), out(alone))
        model.base_model.set_adapter(["default", "other"])
        both = out(model)
        assert not torch.allclose(both, only_lin)
        assert not torch.allclose(both, out(alone))

    def test_only_the_active_one_is_trained(self):
        model = get_peft_model(net(), config())
        model.add_adapter("other", config())
        model.set_adapter("other")
        assert all(".other." in name for name in trainable(model))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert all(".other." in name for name in moved)

    def test_deleting(self):
        model = get_peft_model(net(), config())
        first = out(model)
        model.add_adapter("other", config(r=2))
        model.delete_adapter("other")
        assert torch.equal(out(model), first)
        assert not any("other" in name for name, _ in model.named_modules())
        assert all("other" not in layer.scaling for layer in model.modules() if isinstance(layer, FloraLayer))
        assert list(model.peft_config) == ["default"]

    def test_deleting_the_active_one(self):
        model = get_peft_model(net(), config())
        model.add_adapter("other", config(r=2))
        model.set_adapter("other")
        expected = get_peft_model(net(), config())
        expected.load_state_dict(model.state_dict(), strict=False)
        with pytest.warns(UserWarning, match="Adapter other was active which is now deleted. Setting active adapter"):
            model.delete_adapter("other")
        assert model.active_adapters == ["default"]
        assert torch.equal(out(model), out(expected))

    def test_deleting_the_last(self):
        model = get_peft_model(net(), config())
        model.delete_adapter("default")
        assert not any("default" in name for name, _ in model.named_modules())
        assert torch.equal(out(model.base_model.model), out(net()))

    @pytest.mark.parametrize("name", ["nope", "defaul"])
    def test_deleting_an_unknown_one(self, name):
        model = get_peft_model(net(), config())
        with pytest.raises(ValueError, match=f"Adapter {name} does not exist"):
            model.delete_adapter(name)

    def test_deleting_a_merged_one(self):
        model = get_peft_model(net(), config())
        model.merge_adapter()
        expected = out(model)
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        assert torch.equal(out(model), expected)

    def test_merging_one_of_two(self):
        model = get_peft_model(net(), config())
        model.add_adapter("other", config(r=2))
        model.set_adapter("other")
        expected = out(model)
        merged = model.merge_and_unload(adapter_names=["other"])
        assert_close(out(merged), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["core", "default2", "defaul", "a-b", "flora_factors2", "v1"])
    def test_awkward_names(self, name, tmp_path):
        model = get_peft_model(net(), config(target_modules=["embed", "up", "lin"]))
        first = out(model)
        model.add_adapter(name, config(r=2, target_modules=["embed", "up", "stored"]))
        model.set_adapter(name)
        second = out(model)
        model.save_pretrained(tmp_path)
        for folder, expected in ((tmp_path, first), (tmp_path / name, second)):
            assert torch.equal(out(PeftModel.from_pretrained(net(), folder)), expected)
        loaded = PeftModel.from_pretrained(net(), tmp_path / name, adapter_name=name)
        assert torch.equal(out(loaded), second)
        model.set_adapter("default")
        model.delete_adapter(name)
        assert torch.equal(out(model), first)

    @pytest.mark.parametrize("name", ["0", "1", "12", "weight", "flora_core", "flora_factors"])
    def test_names_that_are_parts_of_keys(self, name):
        """PEFT drops every key with such a part when it saves another adapter."""
        message = f"adapter name '{name}' can be a part of the keys that other adapters are saved under"
        with pytest.raises(ValueError, match=message):
            get_peft_model(net(), config(), adapter_name=name)
        model = get_peft_model(net(), config())
        expected = out(model)
        with pytest.raises(ValueError, match=message):
            model.add_adapter(name, config())
        assert torch.equal(out(model), expected)
        assert list(model.peft_config) == ["default"]

    @pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix:UserWarning")
    @pytest.mark.parametrize("name", ["", "training", "_modules", "a.b", "forward"])
    def test_names_that_no_module_can_have(self, name):
        base = net()
        with pytest.raises(ValueError, match=f"adapter name '{name}' cannot be that of a module"):
            get_peft_model(base, config(), adapter_name=name)
        assert not any(isinstance(module, FloraLayer) for module in base.modules())
        model = get_peft_model(base, config())
        with pytest.raises(ValueError, match=f"adapter name '{name}' cannot be that of a module"):
            model.add_adapter(name, config())
        assert list(model.peft_config) == ["default"]

    @pytest.mark.parametrize("name", ["flora", "lora", "flora_"])
    def test_names_within_the_prefix(self, name, tmp_path):
        with pytest.warns(UserWarning, match=f"Adapter name '{name}' should not be contained in the prefix"):
            model = get_peft_model(net(), config(), adapter_name=name)
        model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(net(), tmp_path / name, adapter_name="x")), out(model))


class TestBeside:
    """What is trained and saved beside the adapter."""

    def test_modules_to_save(self, tmp_path):
        model = get_peft_model(net(), config(target_modules=BODY, modules_to_save=["head"]))
        assert {n for n in trainable(model) if "flora_" not in n} == {
            "base_model.model.head.modules_to_save.default.weight",
            "base_model.model.head.modules_to_save.default.bias",
        }
        train(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(net(), tmp_path)), out(model))
        assert not torch.equal(model.base_model.model.head.weight, net().head.weight)

    @pytest.mark.parametrize(
        ("bias", "expected"),
        [
            ("none", set()),
            ("flora_only", {"conv", "up", "stored"}),
            ("all", {"conv", "up", "stored", "lin", "head"}),
        ],
    )
    def test_biases(self, bias, expected, tmp_path):
        model = get_peft_model(net(), config(target_modules=["embed", "conv", "up", "stored"], bias=bias))
        biases = {n.split(".")[2] for n in trainable(model) if n.endswith("bias")}
        assert biases == expected
        train(model)
        for name in ("conv", "up", "stored", "lin", "head"):
            layer = getattr(model.base_model.model, name)
            assert torch.equal(layer.bias, getattr(net(), name).bias) == (name not in expected)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path)
        assert torch.equal(out(loaded), out(model))

    @pytest.mark.parametrize("base", [bert, gpt2])
    def test_trainable_tokens(self, base, tmp_path):
        targets = "all-linear"
        model = get_peft_model(base(), config(target_modules=targets, trainable_token_indices=[3, 5]))
        train(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(base(), tmp_path)), out(model))
        assert_close(
            out(model.merge_and_unload()), out(PeftModel.from_pretrained(base(), tmp_path)), rtol=1e-4, atol=1e-5
        )

    def test_a_model_with_a_module_of_the_prefixs_name(self, tmp_path):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.flora_core = nn.Linear(4, 4)
                self.lin = nn.Linear(4, 4)

            def forward(self, x):
                return self.lin(self.flora_core(x))

        model = get_peft_model(Named(), config(target_modules=["lin"]))
        assert not any("flora_core.weight" in n and ".lin." not in n for n in trainable(model))
        model.save_pretrained(tmp_path)
        x = torch.randn(2, 4)
        assert torch.equal(out(PeftModel.from_pretrained(Named(), tmp_path), x), out(model, x))
        assert not any("model.flora_core" in key for key in get_peft_model_state_dict(model))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_of_the_adapter(self, dtype, autocast_adapter_dtype):
        model = get_peft_model(net().to(dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype)
        half = dtype in (torch.float16, torch.bfloat16)
        expected = torch.float32 if half and autocast_adapter_dtype else dtype
        assert {p.dtype for n, p in model.named_parameters() if "flora_" in n} == {expected}
        assert out(model).dtype == dtype
        train(model, 1)
        assert all(torch.isfinite(p).all() for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_after_loading(self, dtype, low_cpu_mem_usage, tmp_path):
        model = get_peft_model(net().to(dtype), config())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {p.dtype for n, p in loaded.named_parameters() if "flora_" in n} == {torch.float32}
        assert torch.equal(out(loaded), out(model))

    @pytest.mark.parametrize("base", BASES.values(), ids=BASES)
    def test_autocast(self, base):
        model = get_peft_model(base(), config(kernel_r=2))
        exact = out(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(out(model).float(), exact, rtol=0, atol=0.05 * max(1.0, exact.abs().max().item()))
            train(model, 1)

    def test_merging_under_autocast_is_exact(self):
        model, twin = (get_peft_model(net(), config(kernel_r=2)) for _ in range(2))
        twin.load_state_dict(model.state_dict())
        model.merge_adapter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            twin.merge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class TestGradientCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_are_the_same(self, use_reentrant):
        model = get_peft_model(bert(), config()).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        parameters = [p for p in model.parameters() if p.requires_grad]
        plain = torch.autograd.grad(model(X).logits.square().sum(), parameters)
        base_model = model.get_base_model()
        older = "gradient_checkpointing_enable"  # its name before transformers 5.23
        getattr(base_model, "activation_checkpointing_enable", getattr(base_model, older, None))(
            {"use_reentrant": use_reentrant}
        )
        model.enable_input_require_grads()
        model(X).logits.square().sum().backward()
        for parameter, gradient in zip(parameters, plain, strict=True):
            assert_close(parameter.grad, gradient)


@second_time
class TestBesideLora:
    LORA = {"r": 2, "init_lora_weights": False}

    @pytest.mark.parametrize("first", ["lora", "flora"])
    @pytest.mark.parametrize("lora_targets", [["lin"], ["conv"], ["lin", "head"]])
    def test_one_model_has_both(self, first, lora_targets):
        """On the same and on different layers; each adds its update and keeps its keys to itself."""
        lora = LoraConfig(target_modules=lora_targets, **self.LORA)
        flora = config(target_modules=["lin", "up"])
        model = net()
        for one in (lora, flora) if first == "lora" else (flora, lora):
            inject_adapter_in_model(one, model, adapter_name="lora1" if one is lora else "flora1")
        names = [name for name, _ in model.named_parameters()]
        assert sum("lora_A" in name for name in names) == len(lora_targets)
        assert sum("flora_core" in name for name in names) == 2
        weights = {}
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                key = name.split(".")[0]
                adapter = "flora1" if isinstance(module, FloraLayer) else "lora1"
                weights[key] = weights.get(key, 0) + module.get_delta_weight(adapter).detach()
        plain = net()
        for name, delta in weights.items():
            getattr(plain, name).weight.data += delta
        assert_close(out(model), out(plain), rtol=1e-4, atol=1e-5)

    def test_their_saved_keys_do_not_mix(self):
        model = net()
        inject_adapter_in_model(LoraConfig(target_modules=["lin"], **self.LORA), model, adapter_name="a")
        inject_adapter_in_model(config(target_modules=["conv"]), model, adapter_name="b")
        assert set(model.peft_config) == {"b"} or set(model.peft_config) == {"a", "b"}
        flora = get_peft_model_state_dict(model, adapter_name="b")
        assert set(flora) == {"conv.flora_core.weight", "conv.flora_factors.0.weight", "conv.flora_factors.1.weight"}

    def test_one_peft_model_takes_one_method(self):
        model = get_peft_model(net(), config(target_modules=["lin"]))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("lora1", LoraConfig(target_modules=["conv"], **self.LORA))


class TestConversion:
    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # LoRA asks for it, and then corrects it
    def test_of_linear_layers_is_exact(self):
        model = get_peft_model(net(), config(target_modules=["lin", "stored"]))
        assert model.base_model.supports_lora_conversion()
        expected = out(model)
        lora_config, state_dict = convert_to_lora(model, rank=3)
        lora = get_peft_model(net(), lora_config)
        peft.set_peft_model_state_dict(lora, state_dict)
        assert_close(out(lora), expected, rtol=1e-4, atol=1e-5)

    def test_not_of_other_layers(self):
        model = get_peft_model(net(), config(target_modules=["lin", "conv"]))
        assert not model.base_model.supports_lora_conversion()
        with pytest.raises(TypeError, match="not support"):
            convert_to_lora(model, rank=3)


class TestNotSupported:
    def test_mixed_models(self):
        with pytest.raises(ValueError, match=r"FLORA"):
            get_peft_model(net(), config(), mixed=True)

    @second_time
    def test_a_second_bias(self):
        model = get_peft_model(net(), config(bias="all"))
        with pytest.raises(ValueError, match="only 1 adapter with bias"):
            model.add_adapter("other", config(bias="all"))


class TestTiedEmbeddings:
    def build(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)
        ).eval()

    def test_stay_tied_when_saved_in_full(self, tmp_path):
        given = config(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        model, ids = get_peft_model(self.build(), given), torch.arange(6)[None]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data -= 0.5 * parameter.grad
        inner = model.base_model.model
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
        assert not torch.equal(inner.lm_head.weight, self.build().lm_head.weight)
        expected = model.eval()(ids).logits
        model.save_pretrained(tmp_path)
        assert_close(PeftModel.from_pretrained(self.build(), tmp_path)(ids).logits, expected)
        assert_close(model.merge_and_unload()(ids).logits, expected)

    def test_adapters_cannot_be_tied(self):
        with pytest.raises(
            ValueError, match=r"adapters of tied weights \(lm_head\) cannot be tied; leave the embedding out"
        ):
            get_peft_model(self.build(), config(target_modules=["embed_tokens"], ensure_weight_tying=True))


class TestTransformers:
    """transformers' own methods for adapters."""

    def test_adding_saving_and_loading(self, tmp_path):
        model = bert()
        model.add_adapter(config(target_modules=["query"]), adapter_name="mine")
        expected = out(model)
        assert not torch.equal(expected, out(bert()))
        model.save_pretrained(tmp_path)
        fresh = bert()
        fresh.load_adapter(tmp_path, adapter_name="mine")
        assert torch.equal(out(fresh), expected)
        fresh.disable_adapters()
        assert torch.equal(out(fresh), out(bert()))
        fresh.enable_adapters()
        assert torch.equal(out(fresh), expected)
        fresh.delete_adapter("mine")
        assert torch.equal(out(fresh), out(bert()))

    def test_generating(self):
        model = get_peft_model(gpt2(), config(task_type="CAUSAL_LM"))
        tokens = model.generate(
            input_ids=X[:1, :2], attention_mask=torch.ones(1, 2), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
        assert tokens.shape == (1, 5)


class TestRegistration:
    @staticmethod
    def run(script):
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
        )

    def test_is_in_pefts_tables(self):
        assert PeftType.FLORA == PeftType("FLORA") == PeftType["FLORA"] == "FLORA"
        assert PeftType.FLORA in list(PeftType)
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is FloraConfig
        assert peft.PEFT_TYPE_TO_TUNER_MAPPING["FLORA"] is florapeft.FloraModel
        assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["FLORA"] == "flora_"
        assert isinstance(peft.get_peft_config({"peft_type": "FLORA", "r": 2}), FloraConfig)

    def test_twice_is_silent(self):
        importlib.reload(florapeft)
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is florapeft.FloraConfig is FloraConfig

    def test_a_foreign_flora_is_one_clear_error(self):
        run = self.run("""
            from dataclasses import dataclass
            import warnings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

            class TheirConfig: pass

            PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] = TheirConfig
            try:
                import florapeft
            except ImportError as error:
                print(error)
        """)
        assert (
            "PEFT already has a method named FLORA, <class '__main__.TheirConfig'>, which is not florapeft's"
            in run.stdout
        )
        assert run.returncode == 0, run.stderr


class TestNotes:
    """What is said once per model when an adapter is attached, and not again when it is loaded."""

    def attach(self, model, caplog):
        with caplog.at_level("WARNING", logger="florapeft"):
            adapted = get_peft_model(model, FloraConfig(r=4, target_modules="all-weights"))
        notes = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return adapted, notes

    def test_capped_ranks(self, caplog):
        _, notes = self.attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), caplog)
        assert notes == ["Ranks above a mode's size are capped: 0 mode 1: 4 -> 3; 1 mode 0: 4 -> 2"]

    def test_running_statistics(self, caplog, tmp_path):
        def build():
            return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False))

        adapted, notes = self.attach(build(), caplog)
        assert notes == []
        adapted.eval()(torch.randn(2, 8))
        with torch.no_grad():
            adapted.train()(torch.randn(2, 8))
        assert caplog.records == []
        for _ in range(2):
            adapted(torch.randn(2, 8))
        (note,) = caplog.records
        assert note.getMessage().startswith("1 batch norms are in train mode: their running statistics change")
        caplog.clear()
        adapted.save_pretrained(tmp_path)
        with caplog.at_level("WARNING", logger="florapeft"):
            PeftModel.from_pretrained(build(), tmp_path)
        assert caplog.records == []
