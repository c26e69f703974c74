"""benchmarks/accuracy.py: the methods get what they say they get, and what is kept says what was measured."""

import json
import math
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import accuracy
import adalora
import gradient_lora
import pytest
import torch
import torch.nn.functional as F
from cases import SETTINGS, Case
from torch import nn

from florapeft.retraction import is_orthonormal
from florapeft.train.fitting import WITHIN, trainable


class Tiny(nn.Module):
    """A convolution, a linear layer and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.body, self.linear = nn.Conv2d(4, 12, 3), nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(self.body(self.conv(x).relu().mean((2, 3))).relu())


class Stack(nn.Module):
    """A convolution and five linear layers, of unlike cost; gives a loss as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.conv, sizes = nn.Conv2d(2, 8, 3), [8, 12, 8, 24, 8, 8]
        self.layers = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, x):
        x = self.layers(self.conv(x).mean((2, 3)))
        return SimpleNamespace(out=x, loss=x.square().mean())


def batches(count):
    return [(torch.randn(6, 4, 5, 5), torch.randint(3, (6,))) for _ in range(count)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class TestAdaLora:
    LAYERS = ["conv", *(f"layers.{n}" for n in range(5))]
    COSTS = [8 + 18 + 1, 21, 21, 33, 33, 17]

    def test_it_comes_down_to_its_budget(self):
        torch.manual_seed(0)
        model = adalora.attach(Stack(), self.LAYERS, 500, 40)
        ranks = round(500 / (sum(self.COSTS) / 6))
        assert ranks % 6  # no common rank in the end
        assert trainable(model) == sum(self.COSTS) * math.ceil(1.5 * ranks / 6)
        assert adalora.after_steps(Stack()) is None
        after, optimizer = adalora.after_steps(model), torch.optim.AdamW(model.parameters(), 1e-2)
        x, y = torch.randn(64, 2, 5, 5), torch.randn(64, 8)
        for step in range(1, 41):
            optimizer.zero_grad()
            F.mse_loss(model.base_model.model(x).out, y).backward()
            optimizer.step()
            after(model, optimizer, step)
        values = {n: p for n, p in model.named_parameters() if "lora_E" in n}
        remaining = [int((p != 0).sum()) for p in values.values()]
        assert sum(remaining) == ranks
        assert adalora.kept_parameters(model) == sum(r * c for r, c in zip(remaining, self.COSTS, strict=True))

    def test_the_regulariser_is_pefts(self):
        torch.manual_seed(0)
        model, x = adalora.attach(Stack(), self.LAYERS, 500, 40), torch.randn(4, 2, 5, 5)
        parameters = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
        model.base_model.model(x).loss.backward()  # the loss alone: the hooks add the regulariser
        ours = [parameter.grad.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
            parameter._backward_hooks.clear()
        model.base_model(x).loss.backward()  # with PEFT's regulariser
        for parameter, gradient in zip(parameters, ours, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)

    def test_what_it_cannot_adapt(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(4, 4, 3, groups=2), "c": nn.Conv3d(2, 2, 3)})
        refused = adalora.refused(model, ["a", "b", "c", "c.weight"])
        assert list(refused) == ["b", "c", "c.weight"]
        assert "grouped" in refused["b"]


class TestLoraFromGradients:
    LAYERS = ["conv", "body"]

    def test_gradients_are_autograds_and_the_model_stays(self):
        model, data = Tiny().requires_grad_(False), batches(2)
        model.linear.requires_grad_(True)
        found = gradient_lora.gradients(model, self.LAYERS, data, loss)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
        assert gradient_lora.gradients(model, self.LAYERS, data[:1] * 3, loss).agreement == pytest.approx(1, abs=1e-4)
        assert all(parameter.grad is None for parameter in model.parameters())
        total = sum(loss(model.requires_grad_(True), batch) for batch in data)
        (expected,) = torch.autograd.grad(total, model.conv.weight)
        torch.testing.assert_close(found.sums["conv"], expected.flatten(1))

    def test_start(self):
        model, data = Tiny(), batches(2)
        found = gradient_lora.gradients(model, self.LAYERS, data, loss).sums
        before = model(data[0][0])
        adapted = gradient_lora.attach_with(model, {"conv": 3, "body": 2})
        gradient_lora.start_from_gradients(adapted, found)
        torch.testing.assert_close(adapted(data[0][0]), before)
        layers = dict(adapted.get_base_model().named_modules())
        assert {name: layers[name].scaling["default"] for name in self.LAYERS} == {"conv": 1, "body": 1}
        for name, rank in (("conv", 3), ("body", 2)):
            rows = layers[name].lora_A["default"].weight.flatten(1)
            torch.testing.assert_close(rows @ rows.mT, torch.eye(rank), atol=1e-5, rtol=0)
            kept = torch.linalg.svdvals(found[name])[:rank]
            torch.testing.assert_close((found[name] @ rows.mT).norm(), kept.norm())

    def test_ranks_go_where_the_energy_is(self):
        sharp = torch.outer(torch.randn(10), torch.randn(10))
        flat = torch.linalg.qr(torch.randn(10, 10)).Q
        ranks = gradient_lora.spectrum_ranks({"sharp": sharp, "flat": flat}, 105)
        assert ranks == {"sharp": 1, "flat": 4}
        assert gradient_lora.spectrum_ranks({"sharp": sharp, "flat": flat}, 20) == {"sharp": 1, "flat": 0}


@pytest.fixture(scope="module")
def case():
    case = Case("digits", SETTINGS["digits"], None)
    accuracy.cut_short(case)
    return case


class TestCase:
    def test_every_seed_has_one_warm_head(self, case):
        heads = [case.model(seed).classifier.weight for seed in (0, 0, 1)]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        assert not any(parameter.requires_grad for parameter in case.model(0).parameters())

    @pytest.mark.parametrize("method", ["LoRA", "LoRA, gradient start, ranks by spectrum", "FLoRA", accuracy.RECIPE])
    def test_equal_parameters_and_outputs_as_before(self, case, method):
        base = case.model(0).eval()
        expected = case.task.logits(base, case.task.train)
        model, facts = accuracy.METHODS[method](case, case.model(0), 0)
        torch.testing.assert_close(case.task.logits(model.eval(), case.task.train), expected)
        head = sum(parameter.numel() for parameter in base.classifier.parameters())
        assert facts
        assert abs((trainable(model) - head) / case.goal - 1) <= WITHIN

    def test_what_is_found_once_per_case_draws_no_random_numbers(self, case):
        fresh, starts = accuracy.Case("digits", case.setting, None), []
        for _ in range(2):
            model = case.model(0)
            torch.manual_seed(1)
            model, _ = accuracy.METHODS["LoRA"](fresh, model, 0)
            starts.append([p.sum().item() for name, p in model.named_parameters() if "lora_A" in name])
        assert starts[0] == starts[1]

    def test_a_run(self, case):
        run = accuracy.train(case, "head only", accuracy.Rates(None, 1e-2), 0)
        assert (run["method"], run["head_rate"], run["seed"], run["parameters"]) == ("head only", 1e-2, 0, 0)
        assert 0 <= run["test"] <= 1


def test_a_method_with_nothing_to_train_is_left_out(case, tmp_path, monkeypatch):
    monkeypatch.setattr(case, "goal", case.goal)
    monkeypatch.setattr(case, "task", replace(case.task, head=None))
    accuracy.compare(case, ["head only"], accuracy.Plan(1, 1), tmp_path / "record.json")
    results = json.loads((tmp_path / "record.json").read_text())
    assert list(results["left_out"]) == ["head only"]
    assert "parameters" in results["left_out"]["head only"]
    assert results["runs"] == []


def test_runs_are_kept_and_not_repeated(case, tmp_path, monkeypatch):
    trained = []

    def train(case, method, rates, seed):
        trained.append((method, case.setting.share, *rates, seed))
        score = 0.5 - abs(rates.body - 1e-2) - abs(rates.head - 3.2e-2) + 0.01 * seed
        score += 0.1 * (method == accuracy.RECIPE)
        if case.setting.share < 0.05:
            score = 0.3 - abs(rates.body - 3.2e-3)
        counts = {"parameters": 5, "start_seconds": 0.0, "seconds": 1.0, "share": case.setting.share}
        named = {"method": method, "rate": rates.body, "head_rate": rates.head, "seed": seed}
        further = {"further": {"recall at 1": 0.1 * seed}}
        return {**named, "validation": score, "test": score, **counts, **further}

    monkeypatch.setattr(accuracy, "train", train)
    path = tmp_path / "record.json"
    accuracy.compare(case, ["LoRA", accuracy.RECIPE], accuracy.Plan(2, 1), path)
    first = len(trained)
    accuracy.compare(case, ["LoRA", accuracy.RECIPE], accuracy.Plan(3, 1, (0.02,), 1), path)
    more = [(method, share, rate, 3.2e-2, seed) for method in ("LoRA", accuracy.RECIPE) for share, rate, seed in MORE]
    assert trained[first:] == more
    results = json.loads(path.read_text())
    assert len(results["runs"]) == len(trained) == len(set(trained))
    row = results["methods"]["LoRA"]
    assert (row["rate"], row["head_rate"], row["seeds"]) == (1e-2, 3.2e-2, 3)
    assert row["rates_tried"] == [3.2e-3, 1e-2, 3.2e-2]
    assert row["head_rates_tried"] == [1e-2, 3.2e-2, 1e-1]
    assert row["difference"]["mean"] == pytest.approx(-0.1)
    assert row["test_mean"] == pytest.approx(0.51)
    assert row["further"] == {"recall at 1": pytest.approx(0.1)}
    other = results["other_budgets"]["0.02"]["LoRA"]
    assert (other["rate"], other["seeds"], other["test_mean"]) == (3.2e-3, 1, pytest.approx(0.3))
    assert results["rates_at"]["0.02"]["LoRA"] == {"body": 3.2e-3, "head": 3.2e-2}


def test_rates_on_the_finer_grid(case, tmp_path, monkeypatch):
    def train(case, method, rates, seed):
        score = 0.5 - abs(rates.body - 1.8e-2) - abs(rates.head - 3.2e-2)
        counts = {"parameters": 5, "start_seconds": 0.0, "seconds": 1.0, "share": case.setting.share}
        named = {"method": method, "rate": rates.body, "head_rate": rates.head, "seed": seed}
        return {**named, "validation": score, "test": score, **counts}

    monkeypatch.setattr(accuracy, "train", train)
    path = tmp_path / "record.json"
    accuracy.compare(case, ["LoRA"], accuracy.Plan(1, 1), path)
    accuracy.compare(case, ["LoRA", "DoRA"], accuracy.Plan(1, 1, fine=True), path)
    results = json.loads(path.read_text())
    assert results["rates"]["LoRA"] == {"body": 1.8e-2, "head": 3.2e-2}
    assert results["methods"]["LoRA"]["rates_tried"] == [3.2e-3, 1e-2, 1.8e-2, 3.2e-2]
    assert results["fine"] == ["DoRA", "LoRA"]


@pytest.mark.parametrize("noise", [False, True])
def test_the_recipe_does_not_follow_noise(case, monkeypatch, noise):
    monkeypatch.setattr(accuracy, "are_noise", lambda agreement: noise)
    model, facts = accuracy.METHODS[accuracy.RECIPE](case, case.model(0), 0)
    config = model.peft_config["default"]
    assert (config.init_weights, config.allocation) == ((True, "uniform") if noise else ("gradient", "spectrum"))
    assert facts["ranks"] == config.ranks
    assert "agreement" in facts


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("method", ["LoRA, gradient start", "LoRA, gradient start, ranks by spectrum"])
def test_nor_does_lora_with_gradients(case, monkeypatch, method, noise):
    monkeypatch.setattr(accuracy, "are_noise", lambda agreement: noise)
    started = []
    monkeypatch.setattr(gradient_lora, "start_from_gradients", lambda model, found: started.append(found))
    _, facts = accuracy.METHODS[method](case, case.model(0), 0)
    assert bool(started) is not noise
    assert ("ranks" in facts) is (not noise and "spectrum" in method)
    assert "agreement" in facts


@pytest.mark.parametrize("whose", ["FLoRA", "LoRA"])
@pytest.mark.parametrize("kept", [False, True])
def test_factors_stay_orthonormal(case, monkeypatch, whose, kept):
    monkeypatch.setattr(accuracy, "are_noise", lambda agreement: False)
    method = f"{whose}, gradient start, ranks by spectrum" + ", orthonormal" * kept
    models = []
    monkeypatch.setattr(case, "score", lambda model, split: models.append(model) or 0.5)
    assert accuracy.train(case, method, accuracy.Rates(1e-2, 1e-2), 0)["orthonormal"] is kept
    bases = {"FLoRA": "flora_factors", "LoRA": "lora_A"}[whose]
    found = [p if whose == "FLoRA" else p.flatten(1).mT for n, p in models[0].named_parameters() if f".{bases}." in n]
    assert found
    assert all(map(is_orthonormal, found)) is kept


def test_loraga_is_for_linear_layers():
    class Task:
        head = "head"

        def model(self, seed):
            torch.manual_seed(seed)
            return nn.Sequential(OrderedDict(a=nn.Linear(12, 16), b=nn.Linear(16, 16), head=nn.Linear(16, 3)))

    task, data = Task(), [(torch.randn(6, 12), torch.randint(3, (6,))) for _ in range(2)]
    case = SimpleNamespace(task=task, fits={}, layers=["a", "b"], goal=240, trained_along=["head"])
    case.batches, case.loss = lambda seed: data, loss
    base = task.model(0).requires_grad_(False)
    expected = base(data[0][0])
    model, facts = accuracy.METHODS["LoRA-GA"](case, base, 0)
    torch.testing.assert_close(model(data[0][0]), expected)
    starts = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(start.any() for start in starts)  # other than LoRA's, which is zero
    assert facts["rank"] == 4
    case.fits, case.layers, task.head = {}, ["0"], None
    with pytest.raises(accuracy.NothingToTrainError, match="linear layers alone, not 0"):
        accuracy.METHODS["LoRA-GA"](case, nn.Sequential(nn.Conv2d(4, 12, 3)), 0)


# share, rate and seed of the runs that are new
MORE = [(0.05, 1e-2, 2), *((0.02, rate, 0) for rate in (3.2e-2, 1e-2, 3.2e-3, 1e-3))]


def test_another_budget_has_its_own_ranks(case):
    other = case.at(case.setting.share / 2)
    assert other.goal == pytest.approx(case.goal / 2, abs=1)
    assert other.heads is case.heads
    assert (
        accuracy.fitted("lora", other, other.model(0)).fit.rank < accuracy.fitted("lora", case, case.model(0)).fit.rank
    )


def test_a_task_without_its_data_is_left_out(capsys, tmp_path):
    accuracy.main(["cifar100", "--smoke", "--data", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("cifar100 is left out: ")
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("arguments", "name", "epochs"),
    [([], "accuracy_digits", 12), (["--epochs", "30"], "accuracy_digits_30_epochs", 30)],
)
def test_longer_training_has_a_record_of_its_own(monkeypatch, arguments, name, epochs):
    seen = []
    monkeypatch.setattr(accuracy, "compare", lambda case, methods, plan, path: seen.append((case.setting.epochs, path)))
    accuracy.main(["digits", *arguments])
    assert [(epochs, path.stem) for epochs, path in seen] == [(epochs, name)]
