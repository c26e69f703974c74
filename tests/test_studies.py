"""benchmarks/studies.py and variants.py: a variant changes what it says, and what is recorded is what was run."""

import json
from types import SimpleNamespace

import accuracy
import pretrained
import pytest
import studies
import torch
import variants
from cases import SETTINGS, Case
from peft import LoraConfig, get_peft_model
from torch import nn

from florapeft.retraction import is_orthonormal
from florapeft.tucker import Tucker


@pytest.fixture(scope="module")
def case():
    """The 3-D task cut short, on a network that is not pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "skipped", True)
        case = Case("volumes", SETTINGS["volumes"], None)
        accuracy.cut_short(case)
        yield case


def test_magnitudes_apart_are_doras():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    dora = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True))
    parts = dora.base_model.model[0]
    nn.init.normal_(parts.lora_B["default"].weight)
    update = parts.get_delta_weight("default").detach()
    ours = variants.Updated(layer.weight, update, [None] * 4, None, decomposed=True)
    out = nn.functional.conv2d(x, ours(parts.base_layer.weight), layer.bias)
    torch.testing.assert_close(out, dora(x), atol=1e-5, rtol=1e-4)
    expected = torch.autograd.grad(dora(x).square().sum(), parts.lora_magnitude_vector["default"].weight)[0]
    (found,) = torch.autograd.grad(out.square().sum(), ours.magnitude)
    torch.testing.assert_close(found, expected.view_as(found), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("decomposed", [False, True])
def test_forms_begin_as_the_network_and_have_as_many_parameters(case, decomposed):
    x = case.task.test["images"][:4]
    before = case.model(0).eval()(x)
    model = variants.form(case, case.model(0), 0, decomposed=decomposed)
    torch.testing.assert_close(model.eval()(x), before, atol=1e-4, rtol=1e-4)
    count = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not case.in_head(n))
    assert count == pytest.approx(case.goal, rel=0.02)
    assert any("magnitude" in name for name, _ in model.named_parameters()) == decomposed


@pytest.mark.parametrize("build", [variants.gradient_start, variants.plain, variants.form])
def test_retracted_factors_are_orthonormal_but_those_that_began_at_zero(case, build):
    model = build(case, case.model(0), 0, **({"decomposed": True} if build is variants.form else {}))
    before = [factor.clone() for factor in variants.factors(model)]
    with torch.no_grad():
        for factor in variants.factors(model):
            factor.add_(0.02 * torch.randn_like(factor))
    assert not all(map(is_orthonormal, variants.factors(model)))
    variants.retract(case, model, None, 1)
    zeros = sum(not factor.any() for factor in before)
    assert sum(map(is_orthonormal, variants.factors(model))) == len(before) - zeros
    assert bool(zeros) == (build is variants.plain)


def test_absorbed_triangles_leave_updates_as_they_are(case):
    model = variants.gradient_start(case, case.model(0), 0)
    with torch.no_grad():
        for layer in variants.layers(model).values():
            for tensor in (t for t in (layer.tucker("default").core, *variants.factors(layer)) if t is not None):
                tensor.add_(0.05 * torch.randn_like(tensor))
    before = [layer.tucker("default").to_tensor().detach() for layer in variants.layers(model).values()]
    variants.absorb(case, model, None, 1)
    assert all(map(is_orthonormal, variants.factors(model)))
    for layer, update in zip(variants.layers(model).values(), before, strict=True):
        torch.testing.assert_close(layer.tucker("default").to_tensor(), update)


def test_realigned_updates_are_projections_and_the_rest_stays(case):
    model = variants.gradient_start(case, case.model(0), 0)
    found = variants.layers(model)
    for layer in found.values():
        nn.init.normal_(layer.tucker("default").core, std=1e-2)
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in found.items()}
    updates = {name: layer.tucker("default").to_tensor().detach() for name, layer in found.items()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
    case.loss(model, case.batches(0)[0]).backward()
    optimizer.step()
    model.train()
    variants.realign(case, model, optimizer, 4)
    assert len(optimizer.state) == len(trained)
    variants.realign(case, model, optimizer, 5)
    assert model.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert len(optimizer.state) == sum(case.in_head(n) for n in trained)
    for name, layer in found.items():
        torch.testing.assert_close(layer.get_base_layer().weight, weights[name], atol=1e-6, rtol=1e-5)
        core, factors = layer.tucker("default")
        for factor in factors:
            if factor is not None:
                torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1]), atol=1e-4, rtol=0)
        now = Tucker(core, factors).to_tensor().detach()  # what is lost is orthogonal to what is kept
        assert float(((updates[name] - now) * now).sum()) == pytest.approx(0, abs=1e-4 * float(now.square().sum()))


def test_runs_are_chosen_by_validation_and_not_repeated(tmp_path, monkeypatch):
    trained = []

    def run(case, name, variant, rate, seed):
        trained.append((name, rate, seed))
        return {"variant": name, "rate": rate, "seed": seed, "validation": -rate, "test": rate, "parameters": 7}

    monkeypatch.setattr(studies, "run", run)
    path, case = tmp_path / "studies_volumes.json", SimpleNamespace(name="volumes")
    base = studies.STUDIES["start"]["core zero, bases of the summed gradient"]
    row = studies.summary(studies.runs_of(case, path, base, 2))
    assert (row["rate"], row["test_mean"], row["seeds"], row["parameters"]) == (1e-2, 1e-2, 2, 7)
    assert row["rates_tried"] == [1e-2, 1.8e-2, 3.2e-2]
    assert len(trained) == 6
    studies.runs_of(case, path, studies.STUDIES["factors"]["at the core's rate"], 3)  # the same variant
    assert trained[6:] == [(trained[0][0], rate, 2) for rate in (1e-2, 1.8e-2, 3.2e-2)]
    assert len(json.loads(path.read_text())["runs"]) == 9
    assert studies.summary(studies.runs_of(case, path, base, 1))["seeds"] == 1


def test_a_variant_of_another_size_is_left_out(case):
    variant = studies.STUDIES["ranks"]["uniform, kernel rank 1"]
    with pytest.raises(studies.UnequalError, match="it has 9,552 parameters, not 22,210"):
        studies.run(case, "kernel rank 1", variant, 1e-2, 0)
