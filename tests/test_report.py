"""What a report says: its numbers against the dense update; what it reads of an adapter, its run and its base."""

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig, Tucker
from florapeft.report.base import find_base, find_weight, layer_slot, slots, unknown_slot, weight_norm
from florapeft.report.collect import Other, collect, read_tensors
from florapeft.report.measure import measure
from florapeft.report.run import read_run
from florapeft.sources import open_weights
from florapeft.train.comparison import attach, load_network
from florapeft.train.digits import builtin_model_path
from florapeft.tucker import unfold

SHAPES = {
    "vector": ((7,), (7,)),
    "matrix": ((9, 6), (3, 2)),
    "one whole mode": ((9, 3), (2, 3)),
    "conv 1-D": ((6, 5, 4), (3, 2, 2)),
    "conv 2-D": ((8, 6, 3, 3), (3, 4, 3, 2)),
    "depthwise": ((8, 1, 3, 3), (4, 1, 3, 3)),
    "conv 3-D": ((6, 4, 3, 2, 3), (3, 2, 2, 2, 3)),
}


def random_tucker(shape, rank):
    factors = tuple(None if r == d else torch.randn(d, r) for d, r in zip(shape, rank, strict=True))
    return Tucker(torch.randn(rank), factors)


class TestMeasure:
    @pytest.mark.parametrize(("shape", "rank"), SHAPES.values(), ids=SHAPES)
    def test_norm_energies_and_ranks_are_those_of_the_dense_update(self, shape, rank):
        tucker = random_tucker(shape, rank)
        dense = tucker.to_tensor().double()
        found = measure(tucker, has_kernel=False, output_mode=None)
        assert found.norm == pytest.approx(dense.norm().item(), rel=1e-5)
        assert found.taps is None
        assert len(found.energies) == (0 if len(shape) == 1 else len(shape))
        for mode, energies in enumerate(found.energies):
            expected = torch.linalg.svdvals(unfold(dense, mode)).square()
            assert_close(energies, expected[: len(energies)], rtol=1e-4, atol=1e-5)
            assert expected[len(energies) :].sum() < 1e-8 * expected.sum()  # what is left out is zero
            kept = expected.cumsum(0) / expected.sum()
            for share, ranks in found.ranks.items():
                assert ranks[mode] == int((kept < share).sum()) + 1

    @pytest.mark.parametrize("name", ["conv 1-D", "conv 2-D", "depthwise", "conv 3-D"])
    @pytest.mark.parametrize("output_mode", [0, 1])
    def test_kernels_are_those_of_the_dense_update(self, name, output_mode):
        tucker = random_tucker(*SHAPES[name])
        dense = tucker.to_tensor().double()
        found = measure(tucker, has_kernel=True, output_mode=output_mode)
        assert_close(found.taps, dense.square().mean((0, 1)).sqrt(), rtol=1e-4, atol=1e-6)
        filters = dense.movedim(output_mode, 0)  # (out, in, *kernel)
        norms = filters.flatten(1).norm(dim=1)
        assert [f.index for f in found.filters] == norms.topk(min(4, len(norms))).indices.tolist()
        for index, norm, pattern in found.filters:
            assert norm == pytest.approx(norms[index].item(), rel=1e-4)
            left, values, right = torch.linalg.svd(filters[index].flatten(1), full_matrices=False)
            size = values[0] / filters.shape[1] ** 0.5
            sign = torch.sign(left[:, 0].sum())
            assert_close(pattern, (sign * size * right[0]).reshape(pattern.shape), rtol=1e-3, atol=1e-5)

    def test_the_pattern_of_a_single_input_channel_is_the_filter(self):
        tucker = random_tucker(*SHAPES["depthwise"])
        for index, _, pattern in measure(tucker, has_kernel=True, output_mode=0).filters:
            assert_close(pattern, tucker.to_tensor()[index, 0].double(), rtol=1e-4, atol=1e-5)

    def test_zero(self):
        found = measure(Tucker(torch.zeros(2, 2, 3), (torch.randn(5, 2), None, None)), has_kernel=True, output_mode=0)
        assert found.norm == 0
        assert found.ranks == {}


class Everything(nn.Module):
    """A layer of every kind that an adapter knows."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8, padding_idx=2)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "proj": nn.Linear(6, 5)}) for _ in "ab"]
        )
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.deep = nn.Conv3d(4, 8, (2, 3, 3), groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.norm = nn.LayerNorm(8)
        self.batch_norm = nn.BatchNorm2d(6)
        self.left = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return x


CONFIG = {
    "r": 2,
    "kernel_r": 2,
    "scale": 0.5,
    "scale_pattern": {"blocks.1.conv": 3.0, "down_proj": -2.0},
    "target_modules": ["words", "conv", "proj", "up", "deep", "attention"],
    "target_parameters": ["experts.down_proj", "norm.weight"],
    "modules_to_save": ["head"],
    "save_batch_norm": True,
    "init_weights": False,
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder with an adapter of every kind, its base's weights, and the model in memory."""
    folder = tmp_path_factory.mktemp("everything")
    torch.manual_seed(0)
    base = Everything()
    safetensors.torch.save_file(base.state_dict(), folder / "base.safetensors")
    model = peft.get_peft_model(base, FloraConfig(**CONFIG))
    model.save_pretrained(folder / "adapter")
    return folder, model


def dense_updates(model):
    """dW and W by name."""
    found = {}
    for module_name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "tuckers"):
            for weight_name, tucker in layer.tuckers("default").items():
                weight = layer.get_base_layer().get_parameter(weight_name)
                found[layer.target_name(module_name, weight_name)] = (
                    layer.expand(weight_name, tucker, layer.scale_of("default", weight_name)).detach().double(),
                    weight.detach().double(),
                )
    return found


class TestCollect:
    def test_every_number_is_that_of_the_dense_update(self, everything):
        folder, model = everything
        report = collect(folder / "adapter", base=str(folder / "base.safetensors"))
        expected = dense_updates(model)
        assert len(expected) == 11
        assert {layer.slot.name for layer in report.layers} == set(expected)
        for layer in report.layers:
            delta, weight = expected[layer.slot.name]
            assert layer.slot.shape == tuple(delta.shape)
            if layer.slot.name == "words":  # whose padding row only the model knows
                delta[2] = layer.measures.norm
                continue
            assert layer.measures.norm == pytest.approx(delta.norm().item(), rel=1e-5)
            assert layer.relative == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)
            assert layer.share == layer.parameters / weight.numel()
        assert report.parameters == sum(
            p.numel() for n, p in model.named_parameters() if ".flora_" in n and "statistics" not in n
        )
        assert report.saved == {"head": 18, "batch norm statistics": 13}
        others = {part.slot.name: part.is_saved for part in report.network if isinstance(part, Other)}
        assert others == {"left": False, "head": True}

    def test_the_networks_own_knowledge(self):
        base = Everything()
        found = {
            slot.name: slot for slot in slots(base, {"experts.down_proj", "norm.weight", "attention.in_proj_weight"})
        }
        assert list(found)[:2] == ["words", "blocks.0.conv"]  # in the network's order
        assert found["words"].padding == 2
        assert found["up"].modes == ("in", "out", "height", "width")
        assert found["up"].output_mode == 1
        assert found["deep"].kind == "grouped conv 3-D"
        assert found["norm.weight"].kind == "vector"
        assert found["experts.down_proj"].kind == "stack of order 3"
        assert "batch_norm.weight" not in found

    def test_the_padding_row_counts_nothing(self, everything):
        from florapeft.report.collect import _layer

        folder, model = everything
        tuckers, _ = read_tensors(folder / "adapter" / "adapter_model.safetensors")
        slot = layer_slot("words", model.base_model.model.words.get_base_layer())
        layer = _layer(slot, "words", None, tuckers["words", None], FloraConfig(**CONFIG))
        delta = model.base_model.model.words.get_delta_weight("default").detach()
        assert not delta[2].any()
        assert layer.measures.norm == pytest.approx(delta.norm().item(), rel=1e-5)

    def test_without_a_base(self, everything, tmp_path):
        folder, _ = everything
        report = collect(folder / "adapter")
        assert not report.is_relative
        assert report.base_size is None
        assert report.notes == [
            "The base model, which the adapter does not name, is not on this machine: updates are not compared with "
            "their weights. Name it with --base."
        ]
        assert [layer.slot.name for layer in report.layers][:2] == [
            "attention.in_proj_weight",
            "attention.out_proj_weight",
        ]

    def test_a_fresh_adapter(self, tmp_path):
        peft.get_peft_model(Everything(), FloraConfig(**{**CONFIG, "init_weights": True})).save_pretrained(tmp_path)
        report = collect(tmp_path)
        assert report.notes[0] == "Every update is zero: this adapter has not been trained."
        assert all(layer.measures.norm == 0 for layer in report.layers)

    def test_names_sort_by_their_numbers(self, tmp_path):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
        peft.get_peft_model(model, FloraConfig(r=1, target_modules="all-linear")).save_pretrained(tmp_path)
        assert [layer.slot.name for layer in collect(tmp_path).layers] == [str(number) for number in range(12)]

    def test_the_built_in_network(self, tmp_path):
        """A base of transformers': order and kinds come from its configuration, without its weights."""
        base = load_network(str(builtin_model_path()), [str(n) for n in range(10)])
        model = attach("flora", base, {"target_modules": "all-weights", "r": 4, "init_weights": False})
        model.save_pretrained(tmp_path)
        report = collect(tmp_path)
        expected = dense_updates(model)
        assert [layer.slot.name for layer in report.layers] == list(expected)
        assert report.is_ordered
        assert report.base_size == 160_704
        for layer in report.layers:
            delta, weight = expected[layer.slot.name]
            assert layer.relative == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-4)
        assert report.layers[1].slot.kind == "depthwise conv 2-D"
        assert [part.slot.name for part in report.network if isinstance(part, Other)] == ["classifier"]


class TestBase:
    def test_norms_are_summed_in_pieces(self, tmp_path, monkeypatch):
        weight = torch.randn(7, 5, 3)
        tensors = {"a": weight, "half": weight.half(), "packed": torch.ones(3, dtype=torch.uint8), "s": torch.ones(())}
        tensors["broken"] = torch.tensor([1.0, torch.nan])
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        monkeypatch.setattr("florapeft.report.base._CHUNK", 32)
        weights = open_weights(tmp_path, "base")
        assert weight_norm(weights, "a") == pytest.approx(weight.norm().item())
        assert weight_norm(weights, "half") == pytest.approx(weight.half().float().norm().item())
        assert weight_norm(weights, "s") == 1
        assert weight_norm(weights, "broken") is None
        assert find_weight(weights, unknown_slot("packed", (3,), is_bare=True), "") is None
        assert find_weight(weights, unknown_slot("a", (7, 5), is_bare=True), "") is None
        assert find_weight(weights, unknown_slot("a", (7, 5, 3), is_bare=True), "") == "a"

    @pytest.mark.parametrize("with_head", [False, True])
    def test_a_head_changes_every_name(self, tmp_path, with_head):
        """An adapter trained under a head, on a base without one, and the other way round."""
        sizes = {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 9,
        }
        config = transformers.BertConfig(**sizes)
        base, other = transformers.BertModel, transformers.BertForSequenceClassification
        if with_head:
            base, other = other, base
        base(config).save_pretrained(tmp_path / "base")
        flora = FloraConfig(r=2, target_modules=["query", "word_embeddings"], init_weights=False)
        peft.get_peft_model(other(config), flora).save_pretrained(tmp_path / "adapter")
        report = collect(tmp_path / "adapter", base=str(tmp_path / "base"))
        assert report.is_ordered
        prefix = "" if with_head else "bert."
        assert [layer.slot.name for layer in report.layers] == [
            f"{prefix}embeddings.word_embeddings",
            *(f"{prefix}encoder.layer.{number}.attention.self.query" for number in range(2)),
        ]
        assert all(layer.weight_norm for layer in report.layers)
        assert report.layers[0].slot.padding == 0
        assert report.notes == []

    def test_what_is_not_here(self, tmp_path):
        assert find_base(str(tmp_path), ask_hub=False) == tmp_path
        assert find_base(str(tmp_path / "gone"), ask_hub=False) is None
        assert find_base("nobody/nothing", ask_hub=True) is None

    @pytest.mark.parametrize(
        ("shape", "is_bare", "kind"),
        [
            ((3,), True, "vector"),
            ((3, 2), False, "matrix"),
            ((3, 2, 2), True, "stack of order 3"),
            ((3, 2, 5), False, "conv 1-D"),
        ],
    )
    def test_what_a_shape_tells(self, shape, is_bare, kind):
        slot = unknown_slot("x", shape, is_bare)
        assert slot.kind == kind
        assert len(slot.modes) == len(shape)


class TestRun:
    RESULTS = {
        "description": "Digits",
        "methods": [
            {
                "method": "flora",
                "label": "FLoRA",
                "accuracy_mean": 0.91,
                "accuracy_std": 0.01,
                "parameters": 100,
                "share_of_network": 0.01,
                "seconds_mean": 2.0,
                "bytes": 400,
                "runs": [
                    {"seed": 3, "accuracy": 0.90, "losses": [[20, 2.0], [40, 1.0]]},
                    {"seed": 5, "accuracy": 0.92, "losses": []},
                    {"seed": 7, "accuracy": None, "losses": [[20, None], [40, 3.0]]},
                ],
            }
        ],
        "versions": {"torch": "2.13.0", "accelerate": None},
        "commit": "0123456789abcdef",
    }

    def folder(self, tmp_path, job="task: causal-lm\n"):
        (tmp_path / "adapter").mkdir()
        for place in (tmp_path, tmp_path / "adapter"):
            (place / "job.yaml").write_text(job)
        return tmp_path

    @pytest.mark.parametrize("by_adapter", [False, True])
    def test_a_comparison(self, tmp_path, by_adapter):
        place = self.folder(tmp_path)
        (place / "results.json").write_text(json.dumps(self.RESULTS))
        run = read_run(place / "adapter" if by_adapter else place, place / "adapter")
        assert run.metric == "accuracy"
        assert run.methods[0].values == {3: 0.90, 5: 0.92}
        assert run.methods[0].mean == 0.91
        assert [(curve.label, curve.steps, curve.values) for curve in run.curves] == [
            ("FLoRA", [20, 40], [2.0, 1.0]),
            ("FLoRA", [40], [3.0]),
        ]
        assert run.versions == {"torch": "2.13.0", "commit": "0123456789ab"}
        assert run.command == f"flora train {place}/adapter/job.yaml output={place}-again"

    def test_a_single_run(self, tmp_path):
        place = self.folder(tmp_path)
        results = {
            "examples": {"train": 24},
            "steps": 6,
            "train_loss": 0.5,
            "validation": {"loss": 0.4, "accuracy": 1.0},
        }
        (place / "results.json").write_text(json.dumps(results))
        history = [
            {"step": 3, "loss": 0.9},
            {"step": 6, "loss": 0.5},
            {"step": 6, "eval_loss": 0.4, "eval_accuracy": 1.0},
        ]
        state = place / "checkpoints" / "checkpoint-6" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"log_history": history}))
        run = read_run(place, place / "adapter")
        assert run.facts["train examples"] == 24
        assert run.facts["validation accuracy"] == 1.0
        assert [(curve.metric, curve.steps) for curve in run.curves] == [
            ("training loss", [3, 6]),
            ("validation loss", [6]),
            ("accuracy", [6]),
        ]

    def test_tensorboards_log(self, tmp_path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        place = self.folder(tmp_path)
        writer = EventFileWriter(str(place / "logs"))
        for step in (10, 20):
            value = Summary.Value(tag="train/loss", simple_value=1 / step)
            writer.add_event(Event(step=step, wall_time=0, summary=Summary(value=[value])))
        writer.close()
        (curve,) = read_run(place, place / "adapter").curves
        assert curve.steps == [10, 20]
        assert curve.values == pytest.approx([0.1, 0.05])

    def test_the_built_in_jobs_command(self, tmp_path):
        job = "task: builtin\nseeds: [0]\nmax_steps: 5\nadapter: {target_modules: all-weights, r: 8}\n"
        place = self.folder(tmp_path, job)
        assert read_run(place, place / "adapter").command == (
            f"flora train 'seeds=[0]' adapter.r=8 max_steps=5 output={place}-again"
        )

    def test_no_run(self, everything):
        folder, _ = everything
        run = read_run(folder / "adapter", folder / "adapter")
        assert run.folder is None
        assert not run.methods
        assert not run.curves

    def test_broken_results(self, tmp_path):
        place = self.folder(tmp_path)
        (place / "results.json").write_text("{")
        with pytest.raises(ValueError, match=r"cannot read .*results\.json: "):
            read_run(place, place / "adapter")


def change(file, **tensors):
    """Replaces tensors of a safetensors file by key; None removes one."""
    found = safetensors.torch.load_file(file)
    for key, value in tensors.items():
        keys = [other for other in found if other.endswith(key.replace("__", "."))]
        for other in keys:
            if value is None:
                del found[other]
            else:
                found[other] = value
    safetensors.torch.save_file(found, file)


class TestBadInput:
    @pytest.fixture
    def adapter(self, everything, tmp_path):
        return shutil.copytree(everything[0] / "adapter", tmp_path / "adapter")

    def fails(self, adapter, message, **arguments):
        with pytest.raises((ValueError, OSError), match=message):
            collect(adapter, **arguments)

    def test_no_adapter(self, tmp_path):
        self.fails(tmp_path / "gone", "adapter not found: .*gone")
        self.fails(tmp_path, "is not an adapter: it holds no adapter_config.json")

    def test_another_method(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3))
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
        self.fails(tmp_path, "holds an adapter of the method LORA; a FLoRA adapter is needed")

    @pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
    def test_a_config_that_is_none(self, adapter, text):
        (adapter / "adapter_config.json").write_text(text)
        self.fails(adapter, r"cannot read .*adapter_config\.json: ")

    def test_a_newer_format(self, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "format_version": 99}))
        self.fails(adapter, "format version 99")

    def test_a_missing_file(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        self.fails(adapter, r"adapter_model\.safetensors not found; only safetensors are read")

    def test_a_truncated_file(self, adapter):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.fails(adapter, r"cannot read .*adapter_model\.safetensors: ")

    def test_values_that_are_not_finite(self, adapter):
        change(adapter / "adapter_model.safetensors", up__flora_core__weight=torch.full((2, 2, 2, 2), torch.nan))
        self.fails(adapter, r"up\.flora_core\.weight has values that are not finite")

    def test_core_and_factors_that_do_not_fit(self, adapter):
        change(adapter / "adapter_model.safetensors", up__flora_core__weight=torch.ones(3, 2, 2, 2))
        self.fails(adapter, r"up: factors\[0\] has shape \(4, 2\)")

    def test_factors_without_a_core(self, adapter):
        change(adapter / "adapter_model.safetensors", up__flora_core__weight=None)
        self.fails(adapter, "up has factors but no core")

    def test_no_update(self, adapter):
        safetensors.torch.save_file({"head.weight": torch.ones(2)}, adapter / "adapter_model.safetensors")
        self.fails(adapter, "holds no update of FLoRA's")

    def test_a_base_that_is_not_there(self, adapter, tmp_path):
        self.fails(adapter, "base model not found: .*nowhere; a folder", base=str(tmp_path / "nowhere"))

    def test_a_base_that_cannot_be_read(self, adapter, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "model.safetensors").write_bytes(b"half")
        self.fails(adapter, r"cannot read .*model\.safetensors: ", base=str(tmp_path / "base"))
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "base")
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        network, weights = collect(adapter).notes  # nobody asked for it: the page says so, and does without
        assert network.startswith("The base's network cannot be built, so layers stand in the order of their names: ")
        assert weights.startswith("Updates are not compared with the base's weights: cannot read ")

    def test_a_base_of_other_shapes(self, adapter, tmp_path):
        safetensors.torch.save_file({"up.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
        report = collect(adapter, base=str(tmp_path / "other.safetensors"))
        assert not report.is_relative
        assert report.notes == [
            "The base has no readable weight of the same name and shape for attention.in_proj_weight and 10 more: "
            "not compared there."
        ]
