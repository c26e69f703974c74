"""Running statistics: each adapter keeps its own and saves them; otherwise training says once that they are lost."""

import copy
import pickle
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig
from florapeft.batch_norm import FloraBatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Norms with running statistics, one without, and a head with one of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.average = nn.BatchNorm1d(6, momentum=None, affine=False)
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.none = nn.BatchNorm1d(6, track_running_stats=False)
        self.lin = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x):
        x = self.instance(self.average(torch.relu(self.norm(input=self.conv(x)))))
        return self.head(self.lin(self.none(x).mean(2)))


def net():
    torch.manual_seed(0)
    return Net()


NORMS = ["norm", "average", "instance", "head.0"]


def config(**arguments):
    given = {"r": 2, "target_modules": ["conv", "lin"], "init_weights": False, "save_batch_norm": True}
    return FloraConfig(**{**given, **arguments})


def batch(seed=0):
    return torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def train(model, seed=0, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(seed + step)).square().mean().backward()
        optimizer.step()
    return model.eval()


def out(model, x=None):
    with torch.no_grad():
        y = model(batch(99) if x is None else x)
    return y if isinstance(y, torch.Tensor) else y.logits


def statistics(model):
    """Of the base's norms, by name as in the base."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.endswith(STATISTICS) and "flora_" not in name and "modules_to_save" not in name
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def trained(seed=0, **arguments):
    return train(get_peft_model(net(), config(**arguments)), seed)


class TestSaving:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_what_is_loaded_is_what_was_trained(self, low_cpu_mem_usage, tmp_path):
        model = trained()
        assert equal(statistics(model), statistics(net()))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(out(loaded), out(model))
        plain = get_peft_model(net(), config(save_batch_norm=False)).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(out(plain), out(model))

    def test_keys_are_pinned(self, tmp_path):
        trained(target_modules=["lin"]).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "adapter_model.safetensors")
        lin = {"flora_core.weight", "flora_factors.0.weight", "flora_factors.1.weight"}
        assert weights.keys() == {f"base_model.model.lin.{name}" for name in lin} | {
            f"base_model.model.{norm}.flora_statistics.{name}" for norm in NORMS for name in STATISTICS
        }
        assert weights["base_model.model.norm.flora_statistics.num_batches_tracked"] == 3

    def test_training_is_that_of_the_base_model(self):
        """The norms compute what they would have computed, and their statistics are what they would have been."""
        with_own, without = net(), net()
        model, plain = (
            get_peft_model(with_own, config()),
            get_peft_model(without, config(save_batch_norm=False)),
        )
        plain.load_state_dict(model.state_dict(), strict=False)
        train(model)
        train(plain)
        assert_close(out(model), out(plain))
        for name in NORMS:
            own = model.base_model.model.get_submodule(name).flora_statistics["default"]
            for buffer in STATISTICS:
                assert torch.equal(getattr(own, buffer), getattr(plain.base_model.model.get_submodule(name), buffer))

    def test_of_a_norm_in_two_places(self, tmp_path):
        def twice():
            torch.manual_seed(0)
            norm = nn.BatchNorm1d(3)
            return nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)

        model = get_peft_model(twice(), config(target_modules=["0"]))
        places = model.base_model.model
        assert isinstance(places[1], FloraBatchNorm)
        assert places[1] is places[3]
        for seed in range(3):
            model.train()(batch(seed)[..., 0])
        assert equal(statistics(model), statistics(twice()))
        x, model = batch(99)[..., 0], model.eval()
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(twice(), tmp_path).eval()(x), model(x))
        unloaded = model.unload()
        assert unloaded[1] is unloaded[3]
        assert type(unloaded[1]) is nn.BatchNorm1d

    def test_training_on(self, tmp_path):
        model = trained()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
        assert torch.equal(out(train(loaded, seed=5)), out(train(model, seed=5)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w, k: w.pop(k), r"the checkpoint lacks .*norm\.flora_statistics\.default\.running_var"),
            (
                lambda w, k: w.update({k: torch.ones(5)}),
                r"running_var has shape \(5,\) in the checkpoint and \(6,\) in",
            ),
            (lambda w, k: w[k].fill_(float("nan")), "running_var has values that are not finite"),
            (
                lambda w, k: w.update({k: torch.ones(6).int()}),
                "running_var has dtype torch.int32, which is not floating",
            ),
            (
                lambda w, k: w.update({k.replace(".norm", ".none"): w[k].clone()}),
                "none.* for which the model has no place",
            ),
        ],
    )
    def test_a_broken_file_is_one_clear_error(self, change, message, tmp_path):
        trained().save_pretrained(tmp_path)
        file, key = tmp_path / "adapter_model.safetensors", "base_model.model.norm.flora_statistics.running_var"
        weights = load_file(file)
        change(weights, key)
        save_file(weights, file)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(net(), tmp_path)

    def test_a_head_keeps_its_norms_itself(self, tmp_path):
        model = trained(modules_to_save=["head"])
        assert {n for n, m in model.base_model.model.named_modules() if isinstance(m, FloraBatchNorm)} == {*NORMS[:3]}
        model.add_adapter("other", config(modules_to_save=["head"]))
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert {k for k in keys if ".head." in k and "running" in k} == {
            "base_model.model.head.0.running_mean",
            "base_model.model.head.0.running_var",
        }
        assert torch.equal(out(PeftModel.from_pretrained(net(), tmp_path).eval()), out(model))

    def test_a_head_with_another_adapters_norms(self):
        model = trained()
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=r"modules_to_save: another adapter is on head.0, inside head"):
            model.add_adapter("other", config(modules_to_save=["head"]))
        assert list(model.state_dict()) == names

    def test_biases_of_adapted_layers_are_not_those_of_norms(self):
        model = trained(bias="flora_only")
        model.add_adapter("other", config())
        assert model.base_model.model.lin.bias.requires_grad
        assert not model.base_model.model.norm.bias.requires_grad

    @pytest.mark.parametrize("bias", ["all", "flora_only"])
    def test_biases(self, bias, tmp_path):
        model = trained(bias=bias)
        biases = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
        assert biases == ({"conv", "lin"} if bias == "flora_only" else {"conv", "lin", "norm", "none", "head"})
        model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(net(), tmp_path).eval()), out(model))


class TestSeveral:
    def test_have_their_own(self):
        model = trained()
        first = out(model)
        model.add_adapter("other", config())
        model.set_adapter("other")
        fresh = model.base_model.model.norm.flora_statistics["other"]
        assert torch.equal(fresh.running_mean, net().norm.running_mean)
        assert fresh.num_batches_tracked == 0
        train(model, seed=5)
        second = out(model)
        model.set_adapter("default")
        assert torch.equal(out(model), first)
        model.set_adapter("other")
        assert torch.equal(out(model), second)
        with model.disable_adapter():
            assert torch.equal(out(model), out(net().eval()))
        assert equal(statistics(model), statistics(net()))
        model.set_adapter("default")
        model.delete_adapter("other")
        assert not any("other" in key for key in model.state_dict())
        assert torch.equal(out(model), first)

    def test_of_which_one_has_none(self, tmp_path):
        """It has the base's, and training it moves those."""
        model = trained()
        first = out(model)
        model.add_adapter("other", config(save_batch_norm=False))
        model.set_adapter("other")
        train(model, seed=5)
        assert not equal(statistics(model), statistics(net()))
        model.set_adapter("default")
        assert torch.equal(out(model), first)
        model.save_pretrained(tmp_path)
        assert not any("flora_statistics" in key for key in load_file(tmp_path / "other" / "adapter_model.safetensors"))
        model.load_adapter(tmp_path, "again")
        model.set_adapter("again")
        assert torch.equal(out(model.eval()), first)

    def test_active_together_use_the_first_ones(self):
        model = trained(target_modules=["lin"])
        model.add_adapter("other", config(target_modules=["lin"]))
        model.base_model.model.lin.set_scale("other", 0)
        first = out(model)
        model.base_model.set_adapter(["default", "other"])
        assert_close(out(model), first)
        model.base_model.set_adapter(["other", "default"])
        assert not torch.allclose(out(model), first)

    def test_mixed_batches(self):
        base = net()
        base.none = nn.Identity()  # it goes by all samples of the batch
        model = train(get_peft_model(base, config()))
        model.add_adapter("other", config())
        model.set_adapter("other")
        train(model, seed=5)
        model.add_adapter("none", config(save_batch_norm=False))
        names = ["other", "default", "__base__", "none", "other", "default", "none", "__base__"]
        rows = []
        for i, name in enumerate(names):
            model.set_adapter("other" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                rows.append(out(model)[i])
        with torch.no_grad():
            assert_close(model(batch(99), adapter_names=names), torch.stack(rows))
            with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
                model.base_model.model.norm(batch()[:, :1].expand(-1, 6, -1), adapter_names=names[:3])


class TestMerging:
    def test_writes_them_and_takes_them_back_bit_for_bit(self):
        model = trained()
        expected, own = out(model), model.base_model.model.norm.flora_statistics["default"]
        model.merge_adapter()
        assert model.base_model.model.norm.merged_adapters == ["default"]
        assert torch.equal(statistics(model)["norm.running_var"], own.running_var)
        assert_close(out(model), expected)
        assert_close(out(pickle.loads(pickle.dumps(model))), expected)
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        twin.unmerge_adapter()
        for each in (model, twin):
            assert equal(statistics(each), statistics(net()))
            assert_close(out(each), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert_close(out(model), out(net().eval()))
        assert equal(statistics(model), statistics(net()))

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_and_unloading(self, safe_merge):
        model = trained()
        expected = out(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert list(merged.state_dict()) == list(net().state_dict())
        assert_close(out(merged), expected)

    def test_unloading_restores_the_base(self):
        plain = trained().unload()
        assert equal(plain.state_dict(), net().state_dict())
        assert not any(isinstance(module, FloraBatchNorm) for module in plain.modules())

    def test_of_the_other_one(self):
        model = trained()
        model.add_adapter("other", config())
        model.set_adapter("other")
        train(model, seed=5)
        expected = out(model)
        model.set_adapter("default")
        assert_close(out(model.merge_and_unload(adapter_names=["other"])), expected)

    def test_refuses_statistics_that_are_not_finite(self):
        model = trained()
        model.base_model.model.norm.flora_statistics["default"].running_var[2] = float("nan")
        before = statistics(model)
        with pytest.raises(
            ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
        ):
            model.merge_adapter(safe_merge=True)
        assert equal(statistics(model), before)
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, FloraBatchNorm))


class TestInPyTorch:
    @pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, twin_of):
        model = trained()
        twin, expected = twin_of(model), out(model)
        assert torch.equal(out(twin), expected)
        train(twin, seed=5)
        assert not torch.equal(out(twin), expected)
        assert torch.equal(out(model), expected)

    @pytest.mark.parametrize("save_batch_norm", [False, True])
    def test_compiles_without_graph_breaks(self, save_batch_norm):
        base = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU())
        model = get_peft_model(base, config(target_modules=["0"], save_batch_norm=save_batch_norm)).train()
        twin = copy.deepcopy(model)
        torch.compiler.reset()
        assert_close(torch.compile(twin, fullgraph=True, backend="eager")(batch()), model(batch()))
        assert equal(twin.state_dict(), model.state_dict())

    def test_state_dict(self):
        model, other = trained(), get_peft_model(net(), config())
        other.load_state_dict(model.state_dict())
        assert torch.equal(out(other.eval()), out(model))
        assert not any("running" in name for name, _ in model.named_parameters())

    def test_status(self):
        model = trained()
        model.add_adapter("other", config(save_batch_norm=False))
        layers = {status.name: status for status in model.get_layer_status()}
        assert layers["model.norm"].module_type == "flora.FloraBatchNorm"
        assert layers["model.norm"].available_adapters == ["default"]
        status = model.get_model_status()
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.requires_grad == {"default": True, "other": False}

    @pytest.mark.parametrize(
        ("norm", "shape"),
        [(nn.BatchNorm2d, (4, 5)), (nn.BatchNorm3d, (2, 3, 2)), (nn.SyncBatchNorm, (5,)), (nn.InstanceNorm2d, (4, 5))],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_norms(self, norm, shape, dtype):
        arguments = {"track_running_stats": True} if norm is nn.InstanceNorm2d else {}
        base = nn.Sequential(nn.Conv1d(3, 6, 1), norm(6, **arguments)).to(dtype)
        model = get_peft_model(base, config(target_modules=["0"]))
        own, x = model.base_model.model[1], torch.randn(8, 6, *shape, dtype=dtype)
        if norm is not nn.SyncBatchNorm:  # which trains on GPUs alone
            own.train()(x)
            assert not torch.equal(own.flora_statistics["default"].running_mean, own.base_layer.running_mean)
        own.flora_statistics["default"].running_var.fill_(3)
        expected = copy.deepcopy(own.base_layer).eval()
        own.flora_statistics["default"].write_to(expected)
        assert torch.equal(own.eval()(x), expected(x))
        assert own.flora_statistics["default"].running_var.dtype == dtype

    def test_a_resnet(self, tmp_path):
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}

        def base():
            torch.manual_seed(0)
            return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))

        given = {"r": 2, "target_modules": "all-weights", "save_batch_norm": True, "modules_to_save": ["classifier"]}
        model = get_peft_model(base(), FloraConfig(**given)).train()
        x, before = torch.randn(4, 3, 32, 32), statistics(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            model(x, labels=torch.arange(4) % 3).loss.backward()
            optimizer.step()
        assert equal(statistics(model), before)
        expected = out(model.eval(), x)
        model.save_pretrained(tmp_path)
        assert torch.equal(out(PeftModel.from_pretrained(base(), tmp_path).eval(), x), expected)
        assert_close(out(model.merge_and_unload(), x), expected, rtol=1e-4, atol=1e-5)


class TestWarning:
    """Without `save_batch_norm`."""

    @pytest.fixture
    def notes(self, caplog):
        caplog.set_level("WARNING", logger="florapeft")
        return lambda: [r.getMessage() for r in caplog.records if "running statistics change" in r.getMessage()]

    @staticmethod
    def attach(**arguments):
        return get_peft_model(net(), config(save_batch_norm=False, **arguments))

    @pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_once_at_the_first_training_step(self, copied, notes):
        model = copied(self.attach())
        with torch.no_grad():
            model.train()(batch())
        with torch.inference_mode():
            model(batch())
        model.eval()(batch())
        assert notes() == []
        train(model)
        (note,) = notes()
        assert note.startswith("4 batch norms are in train mode")
        assert "Set save_batch_norm=True" in note
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
    def test_not_when_unloaded(self, unload, notes):
        plain = getattr(self.attach(), unload)()
        for parameter in plain.parameters():
            parameter.requires_grad = True
        train(plain)
        assert notes() == []

    def test_not_for_what_is_saved(self, notes):
        train(get_peft_model(net(), config()))
        base = nn.Sequential(OrderedDict(lin=nn.Linear(3, 6), head=nn.BatchNorm1d(6)))
        model = get_peft_model(base, config(target_modules=["lin"], modules_to_save=["head"], save_batch_norm=False))
        model.train()(torch.randn(5, 3)).sum().backward()
        assert notes() == []

    def test_of_the_adapter_that_loses_them(self, notes):
        model = get_peft_model(net(), config())
        model.add_adapter("other", config(save_batch_norm=False))
        train(model)
        assert notes() == []
        model.set_adapter("other")
        train(model)
        assert len(notes()) == 1

    def test_not_without_running_statistics(self, notes):
        base = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))
        model = get_peft_model(base, config(target_modules=["0"], save_batch_norm=False))
        model.train()(torch.randn(5, 3)).sum().backward()
        assert notes() == []
