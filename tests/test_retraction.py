"""Factors that stay orthonormal while they are trained."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from test_gradients import TARGETS, Net
from torch import nn

from florapeft import FloraConfig, FloraLayer, initialize_from_gradients, keep_orthonormal
from florapeft.retraction import is_orthonormal, nearest_orthonormal


class Optimizer:
    """What is not of torch."""


class ScheduleFree(torch.optim.SGD):
    """What is, and evaluates other parameters than it trains."""

    def eval(self):
        pass


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and then the parameters once more."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.9)


def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).square().mean()


def make_batches() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randint(0, 20, (4, 8)) for _ in range(3)]


batches = pytest.fixture(make_batches)


def adapted(batches):
    torch.manual_seed(0)
    config = FloraConfig(r=2, kernel_r=2, init_weights="gradient", **TARGETS)
    model = get_peft_model(Net(), config).eval()  # whose dropout is not what is tested
    initialize_from_gradients(model, batches, loss)
    return model


def tuckers(model, adapter_name: str = "default"):
    for layer in model.modules():
        if isinstance(layer, FloraLayer) and adapter_name in layer.flora_core:
            yield from layer.tuckers(adapter_name).values()


def factors(model):
    return [factor for tucker in tuckers(model) for factor in tucker.factors if factor is not None]


def train(model, optimizer, batches, steps: int = 3):
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches[step % len(batches)]).backward()
        optimizer.step()


def adam(model, rate: float = 0.05):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)


class TestNearest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(7, 3), (5, 40, 12), (6, 6), (9, 1)])
    def test_is_the_orthogonal_factor_of_the_polar_form(self, shape, dtype):
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q
        moved = (basis + 0.1 * torch.randn_like(basis)).to(dtype)
        u, _, vh = torch.linalg.svd(moved.to(torch.promote_types(dtype, torch.float32)), full_matrices=False)
        found = nearest_orthonormal(moved)
        assert found.dtype == u.dtype
        torch.testing.assert_close(found, u @ vh)

    @pytest.mark.parametrize(("d", "r", "size"), [(4096, 64, 0.003), (768, 256, 0.01), (4096, 8, 0.01)])
    def test_steps_that_are_large_are_met(self, d, r, size):
        """Adam's first one at a high rate: all entries by as much."""
        basis = torch.linalg.qr(torch.randn(d, r)).Q
        found = nearest_orthonormal(basis + size * torch.randn(d, r).sign())
        torch.testing.assert_close(found.mT @ found, torch.eye(r), atol=1e-5, rtol=0)

    def test_even_along_one_direction(self):
        basis = torch.linalg.qr(torch.randn(4096, 64)).Q
        assert is_orthonormal(nearest_orthonormal(basis + 0.01 * torch.randn(4096, 1).sign()))

    def test_under_autocast_it_is_not_rounded(self):
        basis = torch.linalg.qr(torch.randn(30, 4)).Q
        moved = basis + 0.1 * torch.randn_like(basis)
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_orthonormal(moved)
        assert torch.equal(found, nearest_orthonormal(moved))

    def test_is_orthonormal_can_say_no(self):
        basis = torch.linalg.qr(torch.randn(30, 4)).Q
        assert is_orthonormal(basis)
        assert is_orthonormal(basis.bfloat16())
        assert not is_orthonormal(1.02 * basis)
        assert not is_orthonormal(torch.zeros(30, 4))
        assert not is_orthonormal(basis.flatten())  # a piece that FSDP leaves
        assert not is_orthonormal(basis.to("meta"))


class TestTraining:
    def test_factors_of_every_kind_stay_orthonormal(self, batches):
        model = adapted(batches)
        before = copy.deepcopy([factor.detach() for factor in factors(model)])
        optimizer = adam(model)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert all(map(is_orthonormal, factors(model)))
        moved = [not torch.allclose(old, new) for old, new in zip(before, factors(model), strict=True)]
        assert sum(moved) > 15

    def test_without_it_they_do_not(self, batches):
        model = adapted(batches)
        train(model, adam(model), batches)
        assert not any(map(is_orthonormal, factors(model)))

    def test_weight_decay_is_undone_and_bfloat16_rounded(self, batches):
        model = adapted(batches).to(torch.bfloat16)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.5)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert all(map(is_orthonormal, factors(model)))

    def test_what_is_frozen_is_let_be(self, batches):
        model = adapted(batches)
        frozen = factors(model)[0].requires_grad_(False)
        before = frozen.clone()
        optimizer = adam(model)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert torch.equal(frozen, before)
        assert all(map(is_orthonormal, factors(model)))

    def test_a_wrapper_that_steps_itself(self, batches):
        model = adapted(batches)
        optimizer = Lookahead(adam(model))
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert all(map(is_orthonormal, factors(model)))

    def test_a_step_is_the_optimizers_and_then_the_nearest(self, batches):
        model, plain = adapted(batches), adapted(batches)
        optimizer = adam(model)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches, 1)
        train(plain, adam(plain), batches, 1)
        for kept, free in zip(tuckers(model), tuckers(plain), strict=True):
            assert torch.equal(kept.core, free.core)
            for mine, other in zip(kept.factors, free.factors, strict=True):
                if mine is not None:
                    torch.testing.assert_close(mine, nearest_orthonormal(other))

    def test_the_handle_ends_it(self, batches):
        model = adapted(batches)
        optimizer = adam(model)
        keep_orthonormal(model, optimizer).remove()
        train(model, optimizer, batches)
        assert not any(map(is_orthonormal, factors(model)))

    def test_accelerates_optimizer(self, batches):
        model = adapted(batches)
        optimizer = Accelerator(cpu=True).prepare(adam(model))
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert all(map(is_orthonormal, factors(model)))

    def test_weights_with_a_zero_factor_are_let_be(self, batches):
        """Those of the default start, but where the output mode is whole, and the core zero."""
        torch.manual_seed(0)
        config = FloraConfig(r=[6, 2], target_modules=["lin", "conv1d"])
        model = get_peft_model(Net(), config).eval()
        optimizer = adam(model)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        inputs, outputs = factors(model)
        assert is_orthonormal(inputs)
        assert not is_orthonormal(outputs)

    def test_an_adapter_without_factors_is_as_it_is(self, batches):
        model = get_peft_model(Net(), FloraConfig(target_modules=[], target_parameters=["gain"])).eval()
        optimizer = adam(model)
        keep_orthonormal(model, optimizer)
        train(model, optimizer, batches)
        assert next(tuckers(model)).core.any()

    def test_another_adapter_is_let_be(self, batches):
        model = adapted(batches)
        model.add_adapter("other", FloraConfig(r=2, init_weights="gradient", **TARGETS))
        before = copy.deepcopy([t.core.detach() for t in tuckers(model, "other")])
        optimizer = adam(model)
        keep_orthonormal(model, optimizer, adapter_name="default")
        train(model, optimizer, batches)
        assert all(map(is_orthonormal, factors(model)))
        assert all(torch.equal(old, t.core) for old, t in zip(before, tuckers(model, "other"), strict=True))


class TestErrors:
    def test_no_such_adapter(self, batches):
        model = adapted(batches)
        with pytest.raises(ValueError, match=r"no FLoRA adapter 'other'; it has \['default'\]"):
            keep_orthonormal(model, adam(model), adapter_name="other")

    def test_what_is_no_model_of_pefts(self, batches):
        model = adapted(batches)
        with pytest.raises(ValueError, match="needs the PeftModel itself, not a Sequential"):
            keep_orthonormal(nn.Sequential(model), adam(model))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (lambda _: Optimizer(), "needs an optimizer of torch, not Optimizer"),
            (lambda p: ScheduleFree(p, 0.1), "does not work with ScheduleFree"),
            (lambda p: torch.optim.LBFGS(p, 0.1), "does not work with LBFGS"),
            (lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), "orthonormal factors that this SGD steps"),
        ],
    )
    def test_optimizers_that_do_not_fit(self, batches, kind, message):
        model = adapted(batches)
        with pytest.raises(ValueError, match=message):
            keep_orthonormal(model, kind([p for p in model.parameters() if p.requires_grad]))

    def test_factors_that_are_trained_already(self, batches):
        model = adapted(batches)
        optimizer = adam(model)
        train(model, optimizer, batches)
        with pytest.raises(ValueError, match=r"no weight with orthonormal factors .* before the training"):
            keep_orthonormal(model, optimizer)
