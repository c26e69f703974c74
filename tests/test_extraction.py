"""Adapters from fine-tuned models: what is reproduced, what is lost, what is refused."""

import copy
import json
import re
import weakref

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tucker_tensor import tucker_to_tensor
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from florapeft import FloraConfig, extract
from florapeft.extraction import Extraction
from florapeft.sources import FileWeights
from florapeft.tucker import hosvd, mode_dot


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6, padding_idx=0)
        self.conv = nn.Conv2d(6, 10, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Linear(10, 5)

    def forward(self, ids):
        x = self.embed(ids).movedim(-1, 1)
        x = self.bn(self.conv(x)).relu().flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


IDS = torch.arange(48).reshape(3, 4, 4) % 12
WEIGHTS = ["embed", "conv", "attention.in_proj_weight", "attention.out_proj.weight", "head"]
FULL = {"r": 100, "target_modules": "all-weights", "bias": "all", "modules_to_save": ["bn"]}


def moved(model, size=0.1):
    """A copy of the model with everything in it changed, but the padding row, which training does not change."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*tuned.parameters(), *tuned.buffers()):
            if tensor.is_floating_point():
                tensor += size * torch.rand_like(tensor)
        for before, after in zip(model.modules(), tuned.modules(), strict=True):
            if getattr(before, "padding_idx", None) is not None:
                after.weight[before.padding_idx] = before.weight[before.padding_idx]
    return tuned


@pytest.fixture
def pair():
    base = Net().eval()
    return base, moved(base)


def errors(model):
    return {fit.name: fit.error for fit in model.extraction.weights}


class TestFullRank:
    def test_reproduces_the_tuned_model(self, pair):
        base, tuned = pair
        tuned.attention.in_proj_bias.data = base.attention.in_proj_bias.data  # no bias to PEFT, by its name
        after = copy.deepcopy(tuned.state_dict())
        model = extract(base, tuned, FloraConfig(**FULL)).eval()
        assert model.extraction.error < 1e-6
        assert model.extraction.lost == ()
        assert_close(model(IDS), tuned(IDS), rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload().state_dict()
        for name, value in after.items():
            assert_close(merged[name], value, rtol=1e-6, atol=1e-6)
        for name, value in tuned.state_dict().items():
            assert torch.equal(value, after[name])

    def test_weights_of_the_base_stay_as_they_are(self, pair):
        base, tuned = pair
        before = {id(p): p.clone() for p in base.parameters()}
        model = extract(base, tuned, FloraConfig(r=2, target_modules="all-weights"))
        assert model.get_base_model() is base  # wrapped in place, as by PEFT
        kept = {id(p): p for p in model.parameters()}
        assert all(torch.equal(kept[key], value) for key, value in before.items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_other_dtypes(self, dtype):
        base = nn.Sequential(nn.Linear(8, 6)).to(dtype)
        tuned = moved(base)
        model = extract(base, tuned, FloraConfig(r=100, target_modules=["0"], bias="all"))
        core = model.base_model.model[0].flora_core["default"].weight
        assert core.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(
            model.merge_and_unload()[0].weight, tuned[0].weight, rtol=0, atol=0 if core.dtype != dtype else 1e-15
        )

    def test_bare_parameters(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.stack = nn.Parameter(torch.randn(3, 6, 5))
                self.gain = nn.Parameter(torch.ones(5))

            def forward(self, x):
                return torch.einsum("ea,eab->eb", x, self.stack) * self.gain

        base = nn.Sequential(Experts())
        tuned = moved(base)
        config = FloraConfig(budget=60, target_parameters=["stack", "gain"])
        model = extract(copy.deepcopy(base), tuned, config)
        ranks = {fit.name: fit.rank for fit in model.extraction.weights}
        assert ranks["0.gain"] == (5,)
        assert len(ranks["0.stack"]) == 3
        assert errors(model)["0.gain"] == 0 < errors(model)["0.stack"] < 1
        full = extract(base, tuned, FloraConfig(r=10, target_parameters=["stack", "gain"]))
        assert_close(full(torch.ones(3, 6)), tuned(torch.ones(3, 6)))

    def test_survives_saving_and_loading(self, pair, tmp_path):
        base, tuned = pair
        fresh, fresh_tuned = copy.deepcopy(base), tuned
        config = FloraConfig(r=3, target_modules="all-weights", modules_to_save=["head"], save_batch_norm=True)
        model = extract(base, fresh_tuned, config).eval()
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert_close(loaded(IDS), model(IDS))
        own = {name: p for name, p in model.named_parameters() if ".flora_" in name}
        assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters() if ".flora_" in name)
        assert all(p.requires_grad for p in own.values()), "it can be trained further"


class TestFit:
    def test_is_as_good_as_tensorlys(self):
        base = nn.Sequential(nn.Conv2d(12, 16, 3))
        tuned = moved(base)
        rank = (5, 4, 2, 2)
        model = extract(base, tuned, FloraConfig(ranks={"0": list(rank)}, target_modules=["0"]))
        update = (tuned[0].weight - base[0].get_base_layer().weight).detach()
        theirs = torch.from_numpy(tucker_to_tensor(tensorly_tucker(update.numpy(), rank, random_state=0)))
        assert errors(model)["0"] <= ((update - theirs).norm() / update.norm()).item() + 1e-3
        got = model.base_model.model[0].get_delta_weight("default")
        assert errors(model)["0"] == pytest.approx(((update - got).norm() / update.norm()).item(), rel=1e-4)
        assert errors(model)["0"] < ((update - hosvd(update, rank).to_tensor()).norm() / update.norm()).item()

    def test_ranks_are_those_of_the_config(self, pair):
        config = FloraConfig(r=3, kernel_r=2, rank_pattern={"embed": 5}, target_modules="all-weights")
        model = extract(*pair, config)
        ranks = {fit.name: fit.rank for fit in model.extraction.weights}
        assert ranks["conv"] == (3, 3, 2, 2)
        assert ranks["embed"] == (5, 5)
        assert model.peft_config["default"].ranks == {name: list(rank) for name, rank in ranks.items()}
        assert config.ranks is None, "the configuration that was given is not changed"

    @pytest.mark.parametrize("scale", [2.0, -0.5])
    def test_scale_is_in_the_adapter_not_in_the_update(self, scale):
        base = nn.Sequential(nn.Linear(8, 6))
        tuned = moved(base)
        model = extract(base, tuned, FloraConfig(r=100, scale=scale, target_modules=["0"], bias="all"))
        assert model.base_model.model[0].scaling["default"] == scale
        assert_close(model.merge_and_unload()[0].weight, tuned[0].weight)

    def test_a_changed_padding_row_is_an_error_that_is_told(self, pair):
        base, tuned = pair
        with torch.no_grad():
            tuned.embed.weight[0] += 1
        change = (tuned.embed.weight - base.embed.weight).detach()
        model = extract(base, tuned, FloraConfig(r=1, target_modules=["embed"]))
        missing = change - model.base_model.model.embed.get_delta_weight("default")
        assert errors(model)["embed"] == pytest.approx((missing.norm() / change.norm()).item(), rel=1e-5)
        tail = torch.linalg.svdvals(change[1:])[1:].norm()
        assert missing[1:].norm().item() == pytest.approx(tail.item(), rel=1e-5), "no rank is spent on it"


@pytest.mark.gpu
def test_on_a_gpu(pair):
    base, tuned = pair
    config = FloraConfig(budget=0.2, target_modules="all-weights", modules_to_save=["head"], save_batch_norm=True)
    expected = extract(copy.deepcopy(base), tuned, config)
    for model in (extract(copy.deepcopy(base), tuned, config, device="cuda"), extract(base.cuda(), tuned, config)):
        assert errors(model) == pytest.approx(errors(expected), abs=1e-4)
        assert_close(model(IDS.to(next(model.parameters()).device)).cpu(), expected(IDS), rtol=1e-3, atol=1e-3)


class TestBudget:
    @pytest.mark.parametrize("share", [0.05, 0.2])
    def test_matrices_are_truncated_svds_at_the_price_of_lora(self, share):
        base = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
        tuned = moved(base)
        for layer, size in zip(tuned, (1.0, 0.1), strict=True):  # of the second one, less is worth keeping
            layer.weight.data = layer.weight + size * torch.randn(layer.weight.shape) @ torch.diag(
                torch.logspace(0, -2, layer.weight.shape[1])
            )
        updates = {str(i): (t.weight - b.weight).detach() for i, (b, t) in enumerate(zip(base, tuned, strict=True))}
        model = extract(base, tuned, FloraConfig(budget=share, target_modules=["0", "1"]))
        assert model.extraction.parameters <= share * sum(p.numel() for p in tuned.parameters())
        for fit in model.extraction.weights:
            r = min(fit.rank)
            assert fit.parameters == r * sum(fit.shape), "as LoRA of that rank"
            tail = torch.linalg.svdvals(updates[fit.name])[r:].norm() / updates[fit.name].norm()
            assert fit.error == pytest.approx(tail.item(), abs=1e-5)
        kept = {fit.name: min(fit.rank) for fit in model.extraction.weights}
        assert kept["0"] > kept.get("1", 0)

    def test_convolutions_end_below_both_flattenings(self):
        true = torch.randn(16, 12, 3, 3)
        for mode, size in enumerate(true.shape):  # spectra that fall in every mode, as those of real updates do
            basis, decay = torch.linalg.qr(torch.randn(size, size)).Q, torch.logspace(0, -1, size)
            true = mode_dot(true, basis * decay, mode)
        base = nn.Sequential(nn.Conv2d(12, 16, 3, bias=False))
        tuned = copy.deepcopy(base)
        tuned[0].weight.data += true
        update = (tuned[0].weight - base[0].weight).detach()
        for share in (0.1, 0.2, 0.3):
            model = extract(copy.deepcopy(base), tuned, FloraConfig(budget=share, target_modules=["0"]))
            budget = int(share * update.numel())
            for matrix in (update.flatten(1), update.permute(0, 2, 1, 3).reshape(48, 36)):
                r = budget // sum(matrix.shape)
                assert model.extraction.error < (torch.linalg.svdvals(matrix)[r:].norm() / matrix.norm()).item()

    def test_kernel_rank_is_kept_to(self, pair):
        model = extract(*pair, FloraConfig(budget=0.2, kernel_r=2, target_modules=["conv"]))
        assert model.extraction.weights[0].rank[2:] == (2, 2)

    def test_what_the_budget_cannot_pay_is_listed_as_lost(self, pair):
        model = extract(*pair, FloraConfig(budget=40, target_modules="all-weights"))
        adapted = {fit.name for fit in model.extraction.weights}
        assert 0 < len(adapted) < len(WEIGHTS)
        lost = {lost.name.removesuffix(".weight") for lost in model.extraction.lost}
        assert {name.removesuffix(".weight") for name in WEIGHTS} - {n.removesuffix(".weight") for n in adapted} <= lost


class TestReport:
    def test_what_is_not_kept_is_lost_with_its_norm(self, pair):
        base, tuned = pair
        change = (tuned.bn.running_mean - base.bn.running_mean).norm().item()
        model = extract(base, tuned, FloraConfig(r=2, target_modules=["conv"], modules_to_save=["head"]))
        report = model.extraction
        lost = {lost.name: lost for lost in report.lost}
        assert lost["bn.running_mean"].norm == pytest.approx(change, rel=1e-5)
        assert lost["bn.running_mean"].relative is None  # it was zero
        assert lost["conv.bias"].relative > 0
        assert "attention.in_proj_weight" in lost
        assert set(report.kept) == {"head.weight", "head.bias"}
        assert not {"head.weight", "conv.weight"} & set(lost)
        assert [lost.norm for lost in report.lost] == sorted((lost.norm for lost in report.lost), reverse=True)

    def test_as_json_and_as_a_table(self, pair):
        report = extract(*pair, FloraConfig(r=2, target_modules=["conv", "embed"])).extraction
        assert isinstance(report, Extraction)
        record = json.loads(json.dumps(report.to_dict()))
        assert record["parameters"] == report.parameters == sum(fit["parameters"] for fit in record["weights"])
        assert record["error"] == pytest.approx(report.error)
        text = str(report)
        assert re.search(r"^conv +10 x 6 x 3 x 3 +2 x 2 x 3 x 3 +68 ", text, re.MULTILINE)
        assert "lost: attention.in_proj_weight, " in text

    def test_targets_that_did_not_change_have_no_adapter(self, pair):
        base, tuned = pair
        tuned.conv.load_state_dict(base.conv.state_dict())
        model = extract(base, tuned, FloraConfig(r=2, target_modules=["conv", "embed"]))
        assert model.extraction.unchanged == ("conv",)
        assert set(model.peft_config["default"].ranks) == {"embed"}
        assert isinstance(model.base_model.model.conv, nn.Conv2d)

    def test_progress_is_told(self, pair):
        calls = []
        extract(*pair, FloraConfig(budget=0.2, target_modules=["conv"]), progress=lambda *call: calls.append(call))
        assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["reading", "measuring", "fitting"]
        assert [call for call in calls if call[1] == call[2]] == [
            ("reading", 14, 14),
            ("measuring", 1, 1),
            ("fitting", 1, 1),
        ]


class TestRefused:
    CONFIG = FloraConfig(r=2, target_modules=["conv"])

    def refuse(self, base, tuned, message, config=CONFIG):
        before = copy.deepcopy(base.state_dict()) if isinstance(base, nn.Module) else None
        with pytest.raises((ValueError, OSError, TypeError), match=message) as failure:
            extract(base, tuned, config)
        assert "\n" not in str(failure.value)
        if before is not None:
            assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
            assert all(
                torch.equal(value, before[name]) or value.isnan().any() for name, value in base.state_dict().items()
            )

    def test_other_architectures(self, pair):
        base, _ = pair
        self.refuse(
            base, nn.Sequential(nn.Linear(3, 3)), r"tuned lacks embed.weight, which base has: are they of one arch"
        )
        tuned = moved(base)
        tuned.further = nn.Linear(2, 2)
        self.refuse(base, tuned, r"tuned has further.weight \(and 1 more\), which base lacks")

    def test_other_shapes(self, pair):
        base, tuned = pair
        tuned.conv = nn.Conv2d(6, 10, 5)
        self.refuse(base, tuned, r"conv.weight has shape \(10, 6, 3, 3\) in base and \(10, 6, 5, 5\) in tuned")

    @pytest.mark.parametrize("side", [0, 1])
    def test_values_that_are_not_finite(self, pair, side):
        with torch.no_grad():
            pair[side].head.bias[2] = float("nan")
        self.refuse(*pair, rf"head.bias of {('base', 'tuned')[side]} has values that are not finite")

    def test_nothing_changed(self, pair):
        base, _ = pair
        self.refuse(base, copy.deepcopy(base), "none of the 1 targets differs between base and tuned")

    def test_quantised(self, pair):
        import bitsandbytes

        base, tuned = pair
        tuned.head = bitsandbytes.nn.Linear8bitLt(10, 5, has_fp16_weights=False)
        self.refuse(base, tuned, "tuned is quantised, as in head")

    def test_adapters(self, pair):
        base, tuned = pair
        self.refuse(base, peft.get_peft_model(tuned, self.CONFIG), r"tuned has an adapter on .*conv: merge it")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"target_modules": ["no_such"]}, "Target modules"),
            ({"target_modules": ["conv"], "budget": 10**9}, "a budget of 1000000000 parameters is more than"),
            ({"target_modules": ["conv"], "budget": 1}, "a budget of 1 parameters is too small"),
            ({"target_modules": ["conv"], "scale": 0.0}, "the scale of conv is 0"),
            (
                {"target_modules": ["conv", "embed"], "r": [2, 2, 2, 2]},
                "rank .* has 4 entries, but the weight of 'embed'",
            ),
            (
                {"target_modules": ["conv"], "trainable_token_indices": [1]},
                "trainable_token_indices cannot be extracted",
            ),
        ],
    )
    def test_configurations(self, pair, config, message):
        self.refuse(*pair, message, FloraConfig(**config))

    def test_what_is_no_model(self, pair, tmp_path):
        base, tuned = pair
        self.refuse(base, tmp_path / "none", "none is neither a folder nor a .safetensors file")
        self.refuse(base, tmp_path, "has no safetensors; one file, or several and their index, are needed")
        (tmp_path / "pytorch_model.bin").touch()
        self.refuse(base, tmp_path, "only safetensors are read")
        (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
        self.refuse(base, tmp_path, r"cannot read .*model\.safetensors")
        self.refuse(base, 3, "tuned must be a module, or a folder of safetensors, got int")
        save_file(
            {name: value.contiguous() for name, value in tuned.state_dict().items()}, tmp_path / "model.safetensors"
        )
        self.refuse(tmp_path, tmp_path, "has no config.json to make the model from")


class TestTied:
    @staticmethod
    def model():
        return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()

    def test_tied_weights_stay_tied(self):
        base = self.model()
        tuned = moved(base)
        with pytest.warns(RuntimeWarning, match="a weight that another module has too"):
            model = extract(base, tuned, FloraConfig(r=100, target_modules=["wte"]))
        assert errors(model).keys() == {"transformer.wte"}
        assert "lm_head.weight" not in {lost.name for lost in model.extraction.lost}

    def test_untied_in_tuned_alone(self):
        base = self.model()
        tuned = moved(base)
        tuned.lm_head.weight = nn.Parameter(tuned.lm_head.weight + 1)
        with pytest.raises(ValueError, match=r"wte.weight and lm_head.weight are one tied weight in base"):
            extract(base, tuned, FloraConfig(r=2, target_modules=["c_attn"]))


def bert():
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, max_position_embeddings=12)
    return BertForSequenceClassification(config).eval()


class TestFolders:
    """A base of transformers' and its fine-tuned form, on disk."""

    @pytest.fixture
    def folders(self, tmp_path):
        base = bert()
        tuned = moved(base)
        base.bert.save_pretrained(tmp_path / "base")  # without the head, and under names without "bert."
        tuned.save_pretrained(tmp_path / "tuned", max_shard_size="8KB")
        assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
        return tmp_path / "base", tmp_path / "tuned", base, tuned

    CONFIG = FloraConfig(r=100, target_modules="all-weights", modules_to_save=["classifier"], bias="all")

    def test_makes_the_adapter_of_the_modules(self, folders, tmp_path):
        base_folder, tuned_folder, base, tuned = folders
        model = extract(base_folder, tuned_folder, self.CONFIG)
        assert all(p.is_meta for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert loaded.peft_config["default"].base_model_name_or_path == str(base_folder)
        merged = loaded.merge_and_unload().state_dict()
        for name, value in tuned.state_dict().items():
            if "LayerNorm.weight" not in name:
                assert_close(merged[name], value, rtol=1e-6, atol=1e-6)
        assert {lost.name.rpartition(".")[2] for lost in model.extraction.lost} == {"weight"}

    def test_holds_few_tensors_at_a_time(self, folders, monkeypatch):
        held, most = [0], [0]

        def read(self, name, device=None, read=FileWeights.read):
            tensor = read(self, name, device)
            held[0] += tensor.nbytes
            most[0] = max(most[0], held[0])
            weakref.finalize(tensor, lambda size: held.__setitem__(0, held[0] - size), tensor.nbytes)
            return tensor

        monkeypatch.setattr(FileWeights, "read", read)
        config = FloraConfig(budget=0.1, target_modules="all-weights", modules_to_save=["classifier"])
        extract(*folders[:2], config)
        assert 0 < most[0] <= 3 * max(p.nbytes for p in folders[2].parameters())

    def test_of_a_folder_and_a_module(self, folders):
        base_folder, tuned_folder, base, tuned = folders
        reports = [
            extract(base_folder, tuned_folder, self.CONFIG).extraction,
            extract(base_folder, tuned, self.CONFIG).extraction,
            extract(base, tuned_folder, self.CONFIG).extraction,
        ]
        assert reports[0].weights == reports[1].weights == reports[2].weights

    def test_a_new_head_must_be_kept(self, folders):
        with pytest.raises(ValueError, match=r"base \(.*\) lacks classifier.weight, which tuned has; modules_to_save"):
            extract(*folders[:2], FloraConfig(r=2, target_modules="all-weights"))

    def test_of_other_types(self, folders, tmp_path):
        TestTied.model().save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="base is a gpt2 and tuned a bert"):
            extract(tmp_path / "other", folders[1], self.CONFIG)

    def test_a_missing_shard(self, folders):
        sorted(folders[1].glob("*.safetensors"))[1].unlink()
        with pytest.raises(FileNotFoundError, match="which is no file of"):
            extract(*folders[:2], self.CONFIG)

    def test_a_shard_elsewhere(self, folders):
        index = folders[1] / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["classifier.bias"] = "../base/model.safetensors"
        index.write_text(json.dumps(content))
        with pytest.raises(FileNotFoundError, match="which is no file of"):
            extract(*folders[:2], self.CONFIG)

    def test_quantised_by_its_config(self, folders):
        path = folders[1] / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
        with pytest.raises(ValueError, match="is quantised"):
            extract(*folders[:2], self.CONFIG)

    def test_no_code_of_the_folder_is_run(self, folders):
        path = folders[1] / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["os.system"]}))
        with pytest.raises(ValueError, match=r"names the architecture 'os.system', which is no transformers' model"):
            extract(*folders[:2], self.CONFIG)


class TestResuming:
    CONFIG = FloraConfig(budget=0.2, target_modules="all-weights")

    def test_goes_on_where_it_was_stopped(self, pair, tmp_path, monkeypatch):
        base, tuned = pair
        expected = extract(copy.deepcopy(base), tuned, self.CONFIG)

        class StoppedError(Exception):
            pass

        def stop(stage, done, count):
            if (stage, done) == ("fitting", 3):
                raise StoppedError

        with pytest.raises(StoppedError):
            extract(base, tuned, self.CONFIG, work=tmp_path / "work", progress=stop)
        assert isinstance(base.conv, nn.Conv2d), "the model has not been touched"
        fitted = []
        import florapeft.extraction as module

        monkeypatch.setattr(module, "hooi", lambda *args, **kwargs: fitted.append(args[1]) or hooi(*args, **kwargs))
        monkeypatch.setattr(module, "hosvd_core", None)
        hooi = __import__("florapeft.tucker", fromlist=["hooi"]).hooi
        model = extract(base, tuned, self.CONFIG, work=tmp_path / "work")
        assert len(fitted) == len(expected.extraction.weights) - 3
        assert model.extraction == expected.extraction
        assert_close(model(IDS), expected(IDS), rtol=0, atol=0)

    def test_results_of_something_else_are_not_used(self, pair, tmp_path):
        base, tuned = pair
        extract(copy.deepcopy(base), tuned, self.CONFIG, work=tmp_path)
        other = moved(base, 0.2)
        model = extract(copy.deepcopy(base), other, self.CONFIG, work=tmp_path)
        assert model.extraction == extract(base, other, self.CONFIG).extraction

    @pytest.mark.parametrize("budget", [None, 0.3])
    def test_nor_those_of_the_way_back(self, pair, tmp_path, budget):
        """Issue: from tuned to base the changes have the same norms, and the opposite sign."""
        base, tuned = pair
        config = self.CONFIG if budget is None else FloraConfig(target_modules="all-weights", budget=budget)
        extract(copy.deepcopy(base), copy.deepcopy(tuned), config, work=tmp_path)
        model = extract(copy.deepcopy(tuned), base, config, work=tmp_path)
        assert_close(model(IDS), extract(copy.deepcopy(tuned), base, config)(IDS), rtol=0, atol=0)

    def test_a_broken_file_is_computed_again(self, pair, tmp_path):
        base, tuned = pair
        first = extract(copy.deepcopy(base), tuned, self.CONFIG, work=tmp_path)
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:100])
        assert extract(base, tuned, self.CONFIG, work=tmp_path).extraction == first.extraction
