"""The saved adapter: its keys and shapes are a promise, and a file that does not fit changes nothing."""

import json
import re
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from florapeft import FloraConfig
from florapeft.checkpoint import check_state_dict

# Published: a change here makes every saved adapter unreadable.
SHAPES = {
    "base_model.model.conv1d.flora_core.weight": (3, 2, 2),
    "base_model.model.conv1d.flora_factors.0.weight": (7, 3),
    "base_model.model.conv1d.flora_factors.1.weight": (5, 2),
    "base_model.model.conv1d.flora_factors.2.weight": (3, 2),
    "base_model.model.conv2d.flora_core.weight": (3, 3, 2, 1),
    "base_model.model.conv2d.flora_factors.0.weight": (8, 3),
    "base_model.model.conv2d.flora_factors.1.weight": (6, 3),
    "base_model.model.conv2d.flora_factors.2.weight": (4, 2),
    "base_model.model.conv3d.flora_core.weight": (3, 3, 1, 2, 2),
    "base_model.model.conv3d.flora_factors.0.weight": (8, 3),
    "base_model.model.conv3d.flora_factors.1.weight": (6, 3),
    "base_model.model.conv3d.flora_factors.4.weight": (3, 2),
    "base_model.model.depthwise.flora_core.weight": (3, 1, 2),
    "base_model.model.depthwise.flora_factors.0.weight": (6, 3),
    "base_model.model.depthwise.flora_factors.2.weight": (5, 2),
    "base_model.model.embed.flora_core.weight": (3, 3),
    "base_model.model.embed.flora_factors.0.weight": (9, 3),
    "base_model.model.embed.flora_factors.1.weight": (6, 3),
    "base_model.model.linear.flora_core.weight": (3, 3),
    "base_model.model.linear.flora_factors.0.weight": (8, 3),
    "base_model.model.linear.flora_factors.1.weight": (6, 3),
    "base_model.model.stored.flora_core.weight": (3, 3),
    "base_model.model.stored.flora_factors.0.weight": (6, 3),
    "base_model.model.stored.flora_factors.1.weight": (8, 3),
    "base_model.model.transposed1d.flora_core.weight": (3, 3, 2),
    "base_model.model.transposed1d.flora_factors.0.weight": (6, 3),
    "base_model.model.transposed1d.flora_factors.1.weight": (8, 3),
    "base_model.model.transposed2d.flora_core.weight": (3, 3, 2, 2),
    "base_model.model.transposed2d.flora_factors.0.weight": (6, 3),
    "base_model.model.transposed2d.flora_factors.1.weight": (8, 3),
    "base_model.model.transposed2d.flora_factors.2.weight": (3, 2),
    "base_model.model.transposed3d.flora_core.weight": (3, 3, 1, 2, 1),
    "base_model.model.transposed3d.flora_factors.0.weight": (6, 3),
    "base_model.model.transposed3d.flora_factors.1.weight": (8, 3),
    "base_model.model.whole.flora_core.weight": (2, 3),
}


def build(width=8):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, width),
            "whole": nn.Linear(3, 2),
            "stored": Conv1D(8, 6),
            "embed": nn.Embedding(9, 6),
            "conv1d": nn.Conv1d(5, 7, 3),
            "conv2d": nn.Conv2d(6, 8, (4, 1)),
            "conv3d": nn.Conv3d(6, 8, (1, 2, 3)),
            "depthwise": nn.Conv1d(6, 6, 5, groups=6),
            "transposed1d": nn.ConvTranspose1d(6, 8, 2),
            "transposed2d": nn.ConvTranspose2d(6, 8, (3, 2)),
            "transposed3d": nn.ConvTranspose3d(6, 8, (1, 2, 1)),
            "head": nn.Linear(8, 2),
        }
    )


def config(**arguments):
    targets = sorted({key.split(".")[2] for key in SHAPES})
    arguments = {"r": 3, "kernel_r": 2, "rank_pattern": {"conv1d": [3, 2, 2]}, "init_weights": False, **arguments}
    return FloraConfig(target_modules=targets, **arguments)


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and its tensors."""
    model = get_peft_model(build(), config())
    model.save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


class TestKeys:
    def test_of_the_file(self, saved):
        _, tensors = saved
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == SHAPES

    @pytest.mark.parametrize("name", ["default", "other"])
    def test_do_not_depend_on_the_adapters_name(self, name):
        model = get_peft_model(build(), config(), adapter_name=name)
        assert set(get_peft_model_state_dict(model, adapter_name=name)) == set(SHAPES)

    def test_in_memory(self):
        model = get_peft_model(build(), FloraConfig(r=2, target_modules=["linear"]), adapter_name="mine")
        assert {name for name, _ in model.named_parameters() if "flora_" in name} == {
            "base_model.model.linear.flora_core.mine.weight",
            "base_model.model.linear.flora_factors.mine.0.weight",
            "base_model.model.linear.flora_factors.mine.1.weight",
        }

    def test_without_a_peft_model(self):
        model = build()
        inject_adapter_in_model(config(), model)
        state = get_peft_model_state_dict(model)
        assert set(state) == {key.removeprefix("base_model.model.") for key in SHAPES}
        other = build()
        inject_adapter_in_model(config(), other)
        set_peft_model_state_dict(other, state)
        assert all(torch.equal(value, get_peft_model_state_dict(other)[key]) for key, value in state.items())

    def test_a_file_written_by_hand_loads(self, tmp_path):
        tensors = {key: torch.randn(shape) for key, shape in SHAPES.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        config().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(build(), tmp_path)
        core, factors = model.base_model.model["conv2d"].tucker("default")
        expected = torch.einsum(
            "abcd,ia,jb,kc->ijkd", core, factors[0], factors[1], factors[2]
        )  # the last mode is whole
        prefix = "base_model.model.conv2d.flora_"
        assert torch.equal(core, tensors[f"{prefix}core.weight"])
        assert all(torch.equal(factors[n], tensors[f"{prefix}factors.{n}.weight"]) for n in range(3))
        torch.testing.assert_close(model.base_model.model["conv2d"].get_delta_weight("default"), expected)

    def test_whatever_the_start(self, tmp_path):
        for start in ("released", "variance", "zero_output", True):
            get_peft_model(build(), config(init_weights=start)).save_pretrained(tmp_path)
            tensors = load_file(tmp_path / "adapter_model.safetensors")
            assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == SHAPES

    def test_a_solved_budget_reloads_without_solving(self, tmp_path):
        targets = ["linear", "conv2d", "embed"]
        model = get_peft_model(build(), FloraConfig(budget=300, target_modules=targets, init_weights=False))
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert set(saved["ranks"]) == set(targets)
        assert saved["budget"] == 300
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        for name in targets:
            ranks = (m.base_model.model[name].tucker("default").rank for m in (model, loaded))
            assert list(ranks) == [tuple(saved["ranks"][name])] * 2


def without(tensors, key):
    return {k: v for k, v in tensors.items() if k != key}


LINEAR = "base_model.model.linear.flora_"
CORE, ROWS = f"{LINEAR}core.weight", f"{LINEAR}factors.0.weight"
BROKEN = {
    "missing core": (
        lambda t: without(t, CORE),
        r"the checkpoint lacks .*linear\.flora_core\.NAME\.weight; is it for another base model\?$",
    ),
    "missing factor": (
        lambda t: without(t, ROWS),
        r"lacks .*linear\.flora_factors\.NAME\.0\.weight; is it for another base model\?$",
    ),
    "everything missing": (lambda t: {}, r"the checkpoint lacks .* \(and 34 more\); is it for another base model\?$"),
    "extra factor": (
        lambda t: {**t, "base_model.model.whole.flora_factors.0.weight": torch.ones(2, 2)},
        r"the checkpoint has base_model\.model\.whole\.flora_factors\.0\.weight, for which the model has no place; "
        r"is it for another base model\?$",
    ),
    "extra layer": (
        lambda t: {**t, "base_model.model.nowhere.flora_core.weight": torch.ones(2, 2)},
        r"the checkpoint has base_model\.model\.nowhere\.flora_core\.weight, for which the model has no place; "
        r"is it for another base model\?$",
    ),
    "unknown mode": (
        lambda t: {**t, f"{LINEAR}factors.7.weight": torch.ones(2, 2)},
        r"the checkpoint has .*linear\.flora_factors\.7\.weight, for which the model has no place; "
        r"is it for another base model\?$",
    ),
    "unknown rank": (
        lambda t: {**t, CORE: torch.ones(4, 3), ROWS: torch.ones(8, 4)},
        r"linear\.flora_core\.NAME\.weight \(and 1 more\) has shape \(4, 3\) in the checkpoint and \(3, 3\) in the "
        r"model; was it saved with other ranks than its config says\?$",
    ),
    "another base": (
        lambda t: {**t, ROWS: torch.ones(16, 3)},
        r"linear\.flora_factors\.NAME\.0\.weight has shape \(16, 3\) in the checkpoint and \(8, 3\) in the model; "
        r"is it for another base model\?$",
    ),
    "other order": (
        lambda t: {**t, CORE: torch.ones(3, 3, 1)},
        r"has shape \(3, 3, 1\) in the checkpoint and \(3, 3\)",
    ),
    "NaN": (lambda t: {**t, CORE: torch.full((3, 3), torch.nan)}, r"linear\.flora_core\.NAME\.weight has values"),
    "infinity": (
        lambda t: {**t, ROWS: t[ROWS].index_fill(0, torch.tensor([3]), torch.inf)},
        r"linear\.flora_factors\.NAME\.0\.weight has values that are not finite$",
    ),
    "integers": (
        lambda t: {**t, ROWS: t[ROWS].long()},
        r"linear\.flora_factors\.NAME\.0\.weight has dtype torch\.int64, which is not floating point$",
    ),
    "booleans": (lambda t: {**t, CORE: t[CORE] > 0}, r"has dtype torch\.bool, which is not floating point$"),
    "complex": (lambda t: {**t, CORE: t[CORE].cfloat()}, r"has dtype torch\.complex64, which is not floating point$"),
}


@pytest.mark.parametrize("name", BROKEN)
class TestBroken:
    @staticmethod
    def message(pattern, adapter_name):
        return f"^adapter '{adapter_name}' does not fit this model: .*{pattern.replace('NAME', adapter_name)}"

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_new_model_keeps_its_base(self, name, low_cpu_mem_usage, saved):
        folder, tensors = saved
        spoil, message = BROKEN[name]
        save_file(spoil(tensors), folder / "adapter_model.safetensors")
        base = build()
        before = {key: value.clone() for key, value in base.state_dict().items()}
        with pytest.raises(ValueError, match=self.message(message, "default")):
            PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        after = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items()}
        assert all(torch.equal(after[key], value) for key, value in before.items())

    def test_a_second_adapter_leaves_the_first_alone(self, name, saved):
        folder, tensors = saved
        spoil, message = BROKEN[name]
        save_file(spoil(tensors), folder / "adapter_model.safetensors")
        model = get_peft_model(build(), config())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=self.message(message, "other")):
            model.load_adapter(folder, "other")
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert model.active_adapters == ["default"]

    def test_nothing_is_copied(self, name, saved):
        _, tensors = saved
        spoil, message = BROKEN[name]
        model = get_peft_model(build(), config())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=self.message(message, "default")):
            set_peft_model_state_dict(model, spoil(tensors))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class TestBesideTheAdapter:
    """What is saved beside an adapter is checked too."""

    HEAD = "base_model.model.head.weight"

    @staticmethod
    def new():
        return get_peft_model(build(), config(modules_to_save=["head"], bias="flora_only"))

    def test_keys(self, tmp_path):
        self.new().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        biased = {key.split(".")[2] for key in SHAPES} - {"embed"}
        biases = {f"base_model.model.{name}.base_layer.bias" for name in biased}
        assert set(tensors) == {*SHAPES, *biases, self.HEAD, "base_model.model.head.bias"}

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda w: {"base_model.model.head.weight": torch.full_like(w, torch.nan)}, "values that are not finite"),
            (lambda w: {"base_model.model.head.weight": w.long()}, "dtype torch.int64, which is not floating point"),
            (
                lambda w: {"base_model.model.nine.weight": w},
                "has base_model.model.nine.weight, for which the model has",
            ),
            (
                lambda w: {"base_model.model.linear.base_layer.bias": w[0].fill_(torch.inf)},
                "values that are not finite",
            ),
        ],
        ids=["NaN head", "integer head", "nobody's", "infinite bias"],
    )
    def test_broken(self, spoil, message, tmp_path):
        self.new().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        save_file({**tensors, **spoil(torch.ones(2, 8))}, tmp_path / "adapter_model.safetensors")
        model = self.new()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"^adapter 'default' does not fit this model: .*{message}"):
            model.load_adapter(tmp_path, "default")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_buffer_of_a_head_may_be_infinite(self, tmp_path):
        """Issue: a head with a mask of -inf was saved, and refused when it was loaded."""

        def new():
            torch.manual_seed(0)
            head = nn.Linear(4, 2)
            head.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=head))

        saved = FloraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_weights=False)
        model = get_peft_model(new(), saved)
        model.save_pretrained(tmp_path)
        loaded, x = PeftModel.from_pretrained(new(), tmp_path), torch.randn(3, 4)
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("wraps", ["the model's adapter", "the saved model's other adapter"])
    def test_biases_of_layers_that_one_side_alone_wraps(self, wraps, tmp_path):
        """Issue: `1.bias` of the file is `1.base_layer.bias` where another adapter acts on that layer."""

        def new():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        other = FloraConfig(r=2, target_modules=["1"], init_weights=False)
        model = get_peft_model(
            new(), FloraConfig(r=2, target_modules=["0"], bias="all", init_weights=False), adapter_name="mine"
        )
        model.base_model.model[1].bias.data.add_(1)
        x = torch.randn(3, 4)
        expected = model(x)
        if wraps == "the model's adapter":
            model.save_pretrained(tmp_path)
            loaded = get_peft_model(new(), other)
            loaded.load_adapter(tmp_path / "mine", "mine")
            loaded.set_adapter("mine")
        else:
            model.add_adapter("other", other)
            model.save_pretrained(tmp_path, selected_adapters=["mine"])
            assert "base_model.model.1.base_layer.bias" in load_file(tmp_path / "mine" / "adapter_model.safetensors")
            loaded = PeftModel.from_pretrained(new(), tmp_path / "mine", adapter_name="mine")
        torch.testing.assert_close(loaded(x), expected)

    @pytest.mark.parametrize("name", ["0", "1"])
    def test_a_head_named_like_a_mode_is_refused(self, name):
        """PEFT would take an adapter's factor for the head."""
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        message = rf"modules_to_save=\['{name}'\]: PEFT matches ends of names"
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, FloraConfig(r=2, target_modules=["0", "1"], modules_to_save=[name]))
        assert [type(layer) for layer in base] == [nn.Linear, nn.Linear]

    def test_its_full_name_works(self, tmp_path):
        def new():
            torch.manual_seed(0)
            head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
            return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=head))

        model = get_peft_model(
            new(), FloraConfig(r=2, target_modules=["body"], modules_to_save=["head.1"], init_weights=False)
        )
        model.base_model.model.head[1].modules_to_save["default"].weight.data.add_(1)
        model.save_pretrained(tmp_path)
        loaded, x = PeftModel.from_pretrained(new(), tmp_path), torch.randn(3, 4)
        assert torch.equal(loaded(x), model(x))


class TestOtherFiles:
    def test_for_another_base(self, saved):
        folder, _ = saved
        message = (
            r"linear\.flora_factors\.default\.0\.weight has shape \(8, 3\) in the checkpoint and \(32, 3\) in the "
            r"model; is it for another base model\?"
        )
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(build(width=32), folder)

    def test_for_a_base_without_the_layer(self, saved):
        folder, _ = saved
        base = build()
        del base["linear"]
        with pytest.raises(
            ValueError,
            match=r"the checkpoint has .*linear\.flora_core\.weight \(and 2 more\), for which the model has no",
        ):
            PeftModel.from_pretrained(base, folder)

    def test_after_a_failure_a_good_file_loads(self, saved):
        folder, tensors = saved
        model = get_peft_model(build(), config())
        save_file(without(tensors, CORE), folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="the checkpoint lacks"):
            model.load_adapter(folder, "other")
        save_file(tensors, folder / "adapter_model.safetensors")
        for name in ("other", "another"):
            model.load_adapter(folder, name)
            state = get_peft_model_state_dict(model, adapter_name=name)
            assert all(torch.equal(state[key], value) for key, value in tensors.items())

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_a_failed_load_leaves_no_adapter(self, is_trainable, tmp_path):
        get_peft_model(build(width=16), config()).save_pretrained(tmp_path / "of another base")
        get_peft_model(build(), config(r=2, rank_pattern={})).save_pretrained(tmp_path / "right")
        model = get_peft_model(build(), config())
        with pytest.raises(ValueError, match=r"adapter 'other' does not fit this model: .* for another base model"):
            model.load_adapter(tmp_path / "of another base", "other", is_trainable=is_trainable)
        assert list(model.peft_config) == ["default"]
        assert not any(".other." in key for key in model.state_dict())
        model.load_adapter(tmp_path / "right", "other", is_trainable=is_trainable)
        assert model.base_model.model["linear"].tucker("other").rank == (2, 2)

    def test_a_failed_load_leaves_adapters_that_were_there(self, saved, tmp_path):
        folder, _ = saved
        get_peft_model(build(width=16), config()).save_pretrained(tmp_path / "of another base")
        model = get_peft_model(build(), config())
        model.add_adapter("untrained", config())
        model.load_adapter(folder, "loaded")
        model.add_adapter("trained", FloraConfig.from_pretrained(folder))
        model.set_adapter("trained")
        model.set_adapter("default")
        for name in ("untrained", "loaded", "trained"):
            with pytest.raises(ValueError, match="does not fit this model"):
                model.load_adapter(tmp_path / "of another base", name)
            assert name in model.peft_config
            assert f"base_model.model.linear.flora_core.{name}.weight" in model.state_dict()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floating_dtypes_are_fine(self, dtype, saved):
        folder, tensors = saved
        save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(build(), folder)
        core = model.base_model.model["linear"].tucker("default").core
        assert core.dtype == torch.float32
        assert torch.equal(core, tensors[CORE].to(dtype).float())

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("head.weight", torch.tensor([1.0, torch.nan]), "head.weight has values that are not finite"),
            ("head.weight", torch.tensor([1, 2]), "head.weight has dtype torch.int64, which is not floating point"),
            ("body.weight", torch.ones(2), "the checkpoint has body.weight, for which the model has no place"),
            ("steps", torch.tensor([1, 2]), None),
            ("mask", torch.tensor([0.0, -torch.inf]), None),
            ("base_model.model.head.weight", torch.ones(3), None),  # shapes of what is not ours are PEFT's to check
        ],
    )
    def test_what_is_saved_beside_the_adapter(self, name, value, problem):
        core = {"a.flora_core.default.weight": torch.ones(2)}
        buffers = {"steps": torch.tensor([0, 0]), "mask": torch.zeros(2)}
        others = {**core, **buffers, "head.weight": nn.Parameter(torch.ones(2))}
        refused = nullcontext() if problem is None else pytest.raises(ValueError, match=re.escape(problem))
        with refused:
            check_state_dict({**core, name: value}, core, others, "default")

    @pytest.mark.parametrize("version", [0, 2, 99])
    def test_another_format_version(self, version, saved):
        folder, _ = saved
        path = folder / "adapter_config.json"
        path.write_text(re.sub(r'"format_version": 1', f'"format_version": {version}', path.read_text()))
        with pytest.raises(ValueError, match=f"saved in format version {version}; this florapeft reads 1 to 1"):
            PeftModel.from_pretrained(build(), folder)
