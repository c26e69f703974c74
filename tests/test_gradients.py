"""Ranks and start from one pass of gradients: right for every kind of weight, and the model is as it was."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from florapeft import FloraConfig, allocate, initialize_from_gradients, plan
from florapeft.gradient_sums import GradientSum, Weight, gradient_sums
from florapeft.gradients import are_noise
from florapeft.rank import count_parameters
from florapeft.tucker import hosvd, unfold


class Own(nn.Module):
    """A matrix, a stack of them and a vector that no layer holds."""

    def __init__(self):
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.randn(6, 6) / 3), nn.Parameter(torch.randn(3, 6, 6) / 3)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.stack([x @ self.matrix @ weight for weight in self.stack]).mean(0) * self.gain


class Net(nn.Module):
    """Every kind of weight that is adapted, a batch norm and a dropout."""

    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.conv1d = (
            nn.Embedding(20, 6, padding_idx=0),
            nn.Linear(6, 6),
            tf.pytorch_utils.Conv1D(6, 6),
        )
        self.attention, self.own = nn.MultiheadAttention(6, 2, batch_first=True), Own()
        self.conv, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(6, 3)

    def forward(self, ids):
        x = self.conv1d(torch.tanh(self.lin(self.embed(ids))))
        x = self.own(self.attention(x, x, x)[0])
        y = self.up(F.relu(self.dropout(self.norm(self.grouped(self.conv(x[:, None]))))))
        return self.head(x).mean(1) + y.mean((2, 3))[:, :3]


TARGETS = {
    "target_modules": ["embed", "lin", "conv1d", "attention", "conv", "grouped", "up"],
    "target_parameters": ["matrix", "stack", "gain"],
}
NAMES = {
    "embed": "embed.weight", "lin": "lin.weight", "conv1d": "conv1d.weight", "conv": "conv.weight", "up": "up.weight",
    "attention.in_proj_weight": "attention.in_proj_weight", "attention.out_proj.weight": "attention.out_proj.weight",
    "grouped": "grouped.weight", "own.matrix": "own.matrix", "own.stack": "own.stack", "own.gain": "own.gain",
}  # fmt: skip


def batches(count=2):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(1, 20, (4, 8), generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model, given):
    """The plain way: all gradients of a copy in eval mode, summed."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    for batch in given:
        loss(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def state(model):
    """All that a pass could change."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()},
        {name: len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for name, p in model.named_parameters()},
        torch.get_rng_state(),
    )


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
            continue
        assert a.keys() == b.keys()
        for key in a:
            for x, y in zip(
                a[key] if isinstance(a[key], tuple) else [a[key]],
                b[key] if isinstance(b[key], tuple) else [b[key]],
                strict=True,
            ):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key


def net():
    model = Net().train()
    model.own.eval()
    model.lin.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones(3, 6)
    model.conv.weight.grad = torch.ones(8, 1, 3, 3)
    return model


class TestPass:
    def weights(self, model):
        return {
            target: Weight(model.get_submodule(name.split(".")[0]), name.partition(".")[2])
            for target, name in NAMES.items()
        }

    def test_is_the_sum_of_the_gradients_and_leaves_no_trace(self):
        model = net()
        before, expected = state(model), gradients(model, batches())
        sums = gradient_sums(model, self.weights(model), batches(), loss)
        assert sums.keys() == NAMES.keys()
        for target, name in NAMES.items():
            torch.testing.assert_close(sums[target].value.to_tensor(), expected[name])
        assert_same(state(model), before)

    def test_every_gradient_is_freed_at_once(self, monkeypatch):
        model, held, plain = net(), [], GradientSum.add

        def add(self, gradient):
            held.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])
            plain(self, gradient)

        monkeypatch.setattr(GradientSum, "add", add)
        gradient_sums(model, self.weights(model), batches(), loss)
        assert held == [[]] * (2 * len(NAMES))

    def test_no_grad_outside(self):
        model = net()
        with torch.no_grad():
            sums = gradient_sums(model, self.weights(model), batches(), loss)
        assert len(sums) == len(NAMES)

    @pytest.mark.parametrize(
        ("given", "kind", "message"),
        [
            ([], ValueError, "a gradient pass needs at least one batch, and there is none"),
            (["bad"], RuntimeError, "the user's own"),
            (["vector"], TypeError, r"must be one number, a tensor; for batch 0 it is shape \(2,\)"),
            (["number"], TypeError, "must be one number, a tensor; for batch 0 it is a float"),
            (["nan"], ValueError, "the loss is nan for batch 0"),
            (["constant"], ValueError, "no weight to adapt has an influence on the loss, which has no gradient"),
            (["other"], ValueError, "no weight to adapt has an influence on the loss, which has no gradient"),
            (["infinite"], ValueError, "the gradient of lin is not finite in batch 0"),
        ],
    )
    def test_bad_input_leaves_no_trace(self, given, kind, message):
        model = net()
        before = state(model)

        def bad(model, batch):
            out = model.lin(torch.ones(1, 6)).sum()
            if batch == "bad":
                raise RuntimeError("the user's own")
            if batch == "infinite":
                return (out * 0).sqrt()
            if batch == "other":
                return model.head.weight.sum()
            return {"vector": torch.ones(2), "number": 1.0, "nan": out * torch.nan, "constant": torch.ones(())}[batch]

        with pytest.raises(kind, match=message):
            gradient_sums(model, self.weights(model), given, bad)
        assert_same(state(model), before)

    def test_what_no_gradient_reaches_is_said(self, caplog):
        model = net()
        weights = self.weights(model)
        with caplog.at_level(logging.WARNING, logger="florapeft"):
            sums = gradient_sums(model, weights, [0], lambda model, _: model.lin(torch.ones(1, 6)).sum())
        assert sums.keys() == {"lin"}
        assert caplog.messages == [f"no gradient reached {len(NAMES) - 1} of {len(NAMES)} weights to adapt, as embed"]

    def test_a_weight_in_two_targets(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        weights = {name: Weight(model[int(name)], "weight") for name in "01"}
        sums = gradient_sums(model, weights, [torch.randn(2, 4)], lambda model, x: model(x).square().sum())
        assert torch.equal(sums["0"].value.core, sums["1"].value.core)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant):
        config = tf.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
        )
        model = tf.LlamaForCausalLM(config).train()
        ids = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
        weights = {str(n): Weight(model.model.layers[n].mlp.up_proj, "weight") for n in range(2)}
        run = [gradient_sums(model, weights, [ids], lambda model, batch: model(**batch).loss)]
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        run.append(gradient_sums(model, weights, [ids], lambda model, batch: model(**batch).loss))
        handle.remove()
        assert len(calls) == 2  # once more in the backward pass
        for name in weights:
            torch.testing.assert_close(run[0][name].value.core, run[1][name].value.core)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_layer_used_more_than_once_has_one_gradient_a_batch(self, reentrant):
        layer = nn.Linear(8, 8)
        layer.gradient_checkpointing = True
        given = [torch.randn(4, 8) for _ in range(3)]

        def repeated(model, x):
            x = x.clone().requires_grad_()
            for _ in range(4):
                x = checkpoint(lambda x: torch.relu(model(x)) + x, x, use_reentrant=reentrant)
            return x.square().mean()

        found = gradient_sums(layer, {"": Weight(layer, "weight")}, given, repeated)[""]
        alone = [gradient_sums(layer, {"": Weight(layer, "weight")}, [x], repeated)[""] for x in given]
        assert [total.count for total in (found, *alone)] == [3, 1, 1, 1]
        assert alone[0].agreement() is None
        plain = GradientSum((8, 8))
        for total in alone:
            plain.add(total.value.core)
            plain.end_batch()
        torch.testing.assert_close(found.value.core, plain.value.core)
        assert found.agreement() == pytest.approx(plain.agreement(), abs=1e-4)

    def test_what_the_embeddings_give_may_be_changed_in_place(self):
        class Scaled(nn.Module):  # as CTRL does it
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)
                self.get_input_embeddings = lambda: self.embed

            def forward(self, ids):
                x = self.embed(ids)
                x *= 6**0.5
                return self.head(x)

        model, ids = Scaled(), torch.arange(6)
        found = gradient_sums(model, {"": Weight(model.head, "weight")}, [ids], lambda m, x: m(x).square().sum())
        model(ids).square().sum().backward()
        torch.testing.assert_close(found[""].value.core, model.head.weight.grad)

    def test_autocast(self):
        model = net()

        def half(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model, batch)

        exact = gradient_sums(model, self.weights(model), batches(), loss)
        sums = gradient_sums(model, self.weights(model), batches(), half)
        for name in ("lin", "own.matrix", "up"):
            assert sums[name].value.core.dtype == torch.float32
            assert F.cosine_similarity(sums[name].value.core.flatten(), exact[name].value.core.flatten(), dim=0) > 0.95

    def test_autocast_around_it(self):
        """Of large weights, whose sums are compressed."""
        model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 4))
        given = [torch.randn(8, 600) for _ in range(2)]
        config = FloraConfig(budget=0.2, init_weights="gradient", target_modules="all-weights")
        around, inside = torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.bfloat16)

        def half(model, x):
            with inside:
                return model(x).float().square().sum()

        expected = allocate(model, config, given, half)
        with around:
            solved = allocate(model, config, given, half)
            initialize_from_gradients(
                get_peft_model(copy.deepcopy(model), FloraConfig(r=4, target_modules="all-weights")), given, half
            )
        assert solved.ranks == expected.ranks
        assert solved.gradient_agreement == expected.gradient_agreement
        for name, bases in expected.gradient_bases.items():
            for basis, exact in zip(solved.gradient_bases[name], bases, strict=True):
                assert basis is exact is None or torch.equal(basis, exact)

    def test_quantized(self):
        bnb = pytest.importorskip("bitsandbytes")
        plain = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 64, bias=False))
        model = nn.Sequential(bnb.nn.Linear4bit(32, 16), nn.Tanh(), bnb.nn.Linear4bit(16, 64, bias=False))
        model.load_state_dict(plain.state_dict())
        for n in (0, 2):  # the weights as they are when read back
            model[n].to("cpu")
            plain[n].weight.data = bnb.functional.dequantize_4bit(model[n].weight.data, model[n].weight.quant_state).to(
                torch.float32
            )
        x = torch.randn(3, 5, 32)
        sums = [
            gradient_sums(m, {str(n): Weight(m[n], "weight") for n in (0, 2)}, [x], lambda m, x: m(x).square().sum())
            for m in (model, plain)
        ]
        for name in ("0", "2"):
            torch.testing.assert_close(sums[0][name].value.core, sums[1][name].value.core, rtol=1e-3, atol=1e-3)

    def quantized(self, monkeypatch, model):
        """Stands in for a quantised layer: the weight of this linear layer has no gradient."""
        monkeypatch.setattr("florapeft.gradient_sums.quantized_as", lambda module: "4bit")
        monkeypatch.setattr("florapeft.gradient_sums.quantization_backend", lambda module: None)
        monkeypatch.setattr("florapeft.gradient_sums.weight_shape", lambda module: tuple(module.weight.shape))
        return {"lin": Weight(model[0], "weight")}

    def test_quantized_under_autocast(self, monkeypatch):
        model, x = nn.Sequential(nn.Linear(6, 4, bias=False)), torch.randn(5, 6)
        weights = self.quantized(monkeypatch, model)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient_sums(model, weights, [x], lambda model, x: model(x).float().sum())
        torch.testing.assert_close(found["lin"].value.core, x.sum(0).expand(4, 6))

    def test_what_a_quantized_layer_gives_may_be_changed_in_place(self, monkeypatch):
        model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True)), torch.randn(5, 6)
        found = gradient_sums(model, self.quantized(monkeypatch, model), [x], lambda model, x: model(x).sum())
        model(x).sum().backward()
        torch.testing.assert_close(found["lin"].value.core, model[0].weight.grad)

    def test_what_a_quantized_layer_was_given_may_not(self, monkeypatch):
        model = nn.Sequential(nn.Linear(4, 4))
        weights = self.quantized(monkeypatch, model)

        def changed(model, x):
            y = model(x)
            x += 1
            return y.sum()

        with pytest.raises(
            ValueError, match="no gradient of lin: the layer's input was changed in place after its use"
        ):
            gradient_sums(model, weights, [torch.randn(5, 4)], changed)


class TestProcesses:
    """Of a distributed job; here threads, which meet at every reduction."""

    @pytest.fixture
    def on_each(self, monkeypatch):
        own, meeting, given = threading.local(), threading.Barrier(2, timeout=20), [None, None]

        def all_reduce(total):
            given[own.rank] = total.clone()
            meeting.wait()
            total.copy_(given[0] + given[1])
            meeting.wait()

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: hasattr(own, "rank"))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: own.rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

        def run(work):
            def process(rank):
                own.rank = rank
                return work(rank)

            with ThreadPoolExecutor(2) as threads:
                return [future.result() for future in [threads.submit(process, rank) for rank in range(2)]]

        return run

    @pytest.fixture
    def experts(self):
        model = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(700, 600)])
        return model, {str(n): Weight(model[n], "weight") for n in range(3)}

    @staticmethod
    def routed(model, batch):
        """Two small experts, to one of which the data go, and a large layer, before or after."""
        expert, x = batch
        wide = model[2](x.repeat(1, 117)[:, :700])
        if expert:
            return (model[1](x).sum() * wide.mean()).square()
        return (model[0](wide[:, :6]) * x).sum()

    @pytest.mark.parametrize("routes", [([0, 1], [1, 0]), ([0, 0], [1, 1]), ([0, 1, 1], [0]), ([0, 1], [])])
    def test_all_get_the_sums_over_all(self, on_each, experts, routes):
        model, weights = experts
        given = [[(expert, torch.randn(4, 6)) for expert in route] for route in routes]
        alone = gradient_sums(model, weights, given[0] + given[1], self.routed)
        models = [copy.deepcopy(model) for _ in routes]
        both = on_each(
            lambda rank: gradient_sums(
                models[rank], {n: Weight(models[rank][int(n)], "weight") for n in weights}, given[rank], self.routed
            )
        )
        for name, expected in alone.items():
            torch.testing.assert_close(both[0][name].value.to_tensor(), both[1][name].value.to_tensor(), rtol=0, atol=0)
            torch.testing.assert_close(
                both[0][name].value.to_tensor(), expected.value.to_tensor(), rtol=1e-4, atol=1e-3
            )
            assert {total[name].count for total in both} == {expected.count}
            assert both[0][name].agreement() == both[1][name].agreement()
            assert both[0][name].agreement() == pytest.approx(expected.agreement(), abs=1e-3)

    def test_without_any_batch(self, on_each, experts):
        def attempt(rank):
            with pytest.raises(ValueError, match="a gradient pass needs at least one batch"):
                gradient_sums(*experts, [], self.routed)

        on_each(attempt)

    def test_with_different_weights(self, on_each, experts):
        model, _ = experts

        def attempt(rank):
            own = copy.deepcopy(model)
            with pytest.raises(
                ValueError,
                match=f"processes 0 and 1 have different weights to adapt, this one 1, of which the first is {rank}: "
                "every process of the job needs the same model and configuration",
            ):
                gradient_sums(
                    own, {str(rank): Weight(own[rank], "weight")}, [torch.randn(2, 6)], lambda m, x: m[rank](x).sum()
                )

        on_each(attempt)


def add(found, gradient):
    found.add(gradient)
    found.end_batch()


class TestSum:
    @pytest.mark.parametrize("shape", [(900, 700), (400, 500, 3), (300, 310, 3, 3)])
    def test_compressed_keeps_the_leading_directions(self, shape):
        def low(seed, size):
            generator = torch.Generator().manual_seed(seed)
            left = torch.linalg.qr(torch.randn(shape[0], 4, generator=generator)).Q
            return size * torch.einsum("ar,r...->a...", left, torch.randn(4, *shape[1:], generator=generator))

        parts = [low(0, 1.0), low(1, 0.3) + 1e-3 * torch.randn(shape)]
        found = GradientSum(shape)
        for part in parts:
            add(found, part)
        assert found.is_compressed
        assert (
            sum(t.numel() for t in (found.value.core, *found.value.factors) if t is not None)
            < torch.Size(shape).numel() / 2
        )
        total = sum(parts)
        exact = torch.linalg.svd(unfold(total, 0), full_matrices=False)
        basis = found.bases((8, *shape[1:]))[0]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(8), atol=1e-4, rtol=0)
        overlap = torch.linalg.svdvals(basis.mT @ exact.U[:, :8])
        assert overlap.min() > 0.99
        energies = found.spectra()[0]
        assert len(energies) == shape[0]
        assert energies[:8] == pytest.approx(exact.S[:8].square().tolist(), rel=1e-2)
        assert sum(energies) == pytest.approx(total.square().sum().item(), rel=1e-3)

    def test_more_directions_than_it_keeps_are_orthonormal_and_always_the_same(self):
        gradient = torch.randn(700, 600)
        found = GradientSum((700, 600))
        found.add(gradient)
        bases = found.bases((200, 600))
        torch.testing.assert_close(bases[0].mT @ bases[0], torch.eye(200), atol=1e-4, rtol=0)
        assert bases[1] is None
        again = GradientSum((700, 600))
        torch.manual_seed(5)
        again.add(gradient)
        assert torch.equal(again.bases((200, 600))[0], bases[0])

    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("shape", [(12, 8, 3, 3), (700, 600)])  # the second is kept compressed
    @pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
    def test_agreement_is_the_share_of_the_common_part(self, shape, common, parts):
        torch.manual_seed(0)
        mean, found, n = torch.randn(shape), GradientSum(shape), 12
        if found.is_compressed:
            mean = torch.randn(shape[0], 32) @ torch.randn(32, shape[1]) / 32**0.5
        for _ in range(n):  # of the sum's energy, n² c against n (1 - c) n of noise
            gradient = common**0.5 * mean + ((1 - common) * n) ** 0.5 * torch.randn(shape)
            apart = torch.randn(shape)  # in which the parts of a batch differ
            for part in [gradient] if parts == 1 else [gradient / 2 + apart, gradient / 2 - apart]:
                found.add(part)
            found.end_batch()
        assert found.count == n
        assert found.agreement() == pytest.approx(common, abs=0.1)

    def test_one_gradient_agrees_with_nothing(self):
        found = GradientSum((4, 4))
        add(found, torch.randn(4, 4))
        assert found.agreement() is None
        add(found, torch.zeros(4, 4))
        assert found.agreement() == pytest.approx(0, abs=1e-6)

    def test_as_many_directions_as_asked_for(self):
        assert GradientSum((1000, 1000), (200, 100)).kept == (200, 128)


class TestInitialize:
    @pytest.fixture
    def attached(self):
        model = net()
        expected = gradients(model, batches())
        return get_peft_model(model, FloraConfig(r=3, kernel_r=2, init_weights="gradient", **TARGETS)), expected

    def test_core_zero_and_factors_the_bases(self, attached):
        model, expected = attached
        before = state(model)
        initialize_from_gradients(model, batches(), loss)
        after = state(model)
        adapters = [key for key in before[0] if ".flora_" in key]
        for part in (before[0], after[0]):
            for key in adapters:
                part.pop(key)
        counts = [part[3] for part in (before, after)]
        assert all(counts[1][name] <= counts[0][name] for name in counts[0])  # the warning's hooks are gone
        assert_same((*before[:3], *before[4:]), (*after[:3], *after[4:]))
        base = model.get_base_model()
        for target, name in NAMES.items():
            module = base.get_submodule(name.split(".")[0] if target.count(".") else target)
            tucker = module.tuckers("default")[name.partition(".")[2]]
            assert not tucker.core.any()
            for factor, basis in zip(tucker.factors, hosvd(expected[name], tucker.rank).factors, strict=True):
                assert (factor is None) == (basis is None)
                if factor is not None:
                    values = torch.linalg.svdvals(factor.detach().mT @ basis)
                    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-3, rtol=0)

    def test_output_is_the_bases_and_it_trains(self, attached):
        model, _ = attached
        x = batches()[0]
        initialize_from_gradients(model, batches(), loss)
        model.eval()
        with model.disable_adapter():
            expected = model(x[0])
        assert torch.equal(model(x[0]), expected)
        loss(model, x).backward()
        cores = {n: p for n, p in model.named_parameters() if "flora_core" in n}
        assert all(p.grad.any() for p in cores.values())

    def test_deterministic(self, attached):
        model, _ = attached
        other = copy.deepcopy(model)
        initialize_from_gradients(model, batches(), loss)
        torch.manual_seed(9)
        initialize_from_gradients(other, batches(), loss)
        assert_same(state(model)[:1], state(other)[:1])

    def test_a_trained_adapter_is_not_overwritten(self, attached):
        model, _ = attached
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        before = state(model)
        with pytest.raises(ValueError, match=r"the update of .* is not zero: adapter 'default' is trained already"):
            initialize_from_gradients(model, batches(), loss)
        assert_same(state(model), before)

    def test_unknown_or_merged(self, attached):
        model, _ = attached
        with pytest.raises(ValueError, match=r"the model has no FLoRA adapter 'other'; it has \['default'\]"):
            initialize_from_gradients(model, batches(), loss, adapter_name="other")
        model.merge_adapter()
        with pytest.raises(ValueError, match="adapters are merged into embed: unmerge them first"):
            initialize_from_gradients(model, batches(), loss)


class TestWarning:
    def test_once_and_only_in_training(self, caplog):
        model = get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), FloraConfig(init_weights="gradient", target_modules=["0"])
        )
        with caplog.at_level(logging.WARNING, logger="florapeft"):
            model.eval()(torch.randn(1, 4))
            caplog.clear()
            model.train()
            model(torch.randn(1, 4))
            model(torch.randn(1, 4))
        assert caplog.messages == [
            "adapter 'default' has init_weights='gradient' and trains from the default start: "
            "florapeft.initialize_from_gradients was not called"
        ]

    def test_not_after_initialising_nor_after_loading(self, tmp_path, caplog):
        base = nn.Sequential(nn.Linear(4, 4))
        config = FloraConfig(r=2, init_weights="gradient", target_modules=["0"])
        model = get_peft_model(copy.deepcopy(base), config)
        initialize_from_gradients(model, [torch.randn(2, 4)], lambda model, x: model(x).square().sum())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        assert_same(state(model)[:1], state(loaded)[:1])
        with caplog.at_level(logging.WARNING, logger="florapeft"):
            model.train()(torch.randn(1, 4))
            loaded.train()(torch.randn(1, 4))
        assert not caplog.messages

    def test_starts_as_the_default(self):
        torch.manual_seed(0)
        given = get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), FloraConfig(init_weights="gradient", r=2, target_modules=["0"])
        )
        torch.manual_seed(0)
        default = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloraConfig(r=2, target_modules=["0"]))
        assert_same(state(given)[:1], state(default)[:1])


class TestAgreement:
    MODEL = staticmethod(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))
    CONFIG = FloraConfig(budget=0.5, target_modules="all-weights")

    @pytest.mark.parametrize(("signs", "expected"), [((1, 1, 1), 1.0), ((1, 1, 0), 0.75), ((1, -1, 1), 0.0)])
    def test_of_batches_that_pull_one_way_or_another(self, signs, expected, caplog):
        def pull(model, sign):
            return sign * model(torch.ones(1, 6)).sum()

        solved = allocate(self.MODEL(), self.CONFIG, signs, pull)
        assert solved.gradient_agreement == pytest.approx(expected, abs=1e-5)
        warned = "the batches' gradients have 0% of their energy in common" in caplog.text
        assert warned == are_noise(solved.gradient_agreement) == (expected < 0.25)
        caplog.clear()
        model = get_peft_model(self.MODEL(), FloraConfig(r=2, target_modules="all-weights", init_weights="gradient"))
        initialize_from_gradients(model, signs, pull)
        assert ("of their energy in common" in caplog.text) == warned

    def test_of_one_batch_is_unknown(self, caplog):
        solved = allocate(self.MODEL(), self.CONFIG, [1], lambda model, sign: model(torch.ones(1, 6)).sum())
        assert solved.gradient_agreement is None
        assert not are_noise(None)
        assert "in common" not in caplog.text


class TestAllocate:
    def test_budget_is_met_and_attached(self, tmp_path):
        model = net()
        before, expected = state(model), gradients(model, batches())
        config = FloraConfig(budget=0.4, init_weights="gradient", **TARGETS)
        given = copy.deepcopy(config)
        solved = allocate(model, config, batches(), loss)
        assert config == given
        assert_same(state(model), before)
        assert solved.ranks.keys() == NAMES.keys()
        assert solved.allocation == "spectrum"
        budget = int(0.4 * sum(p.numel() for p in model.parameters()))
        shapes = {target: expected[name].shape for target, name in NAMES.items()}
        spent = sum(count_parameters(shapes[name], rank) for name, rank in solved.ranks.items())
        assert 0.95 * budget < spent <= budget
        attached = get_peft_model(model, solved)
        assert attached.get_nb_trainable_parameters()[0] == spent
        tucker = attached.get_base_model().conv.tucker("default")
        assert not tucker.core.any()
        for factor, basis in zip(tucker.factors, hosvd(expected["conv.weight"], tucker.rank).factors, strict=True):
            if factor is not None:
                values = torch.linalg.svdvals(factor.detach().mT @ basis)
                torch.testing.assert_close(values, torch.ones_like(values), atol=1e-3, rtol=0)
        attached.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(net(), tmp_path)
        assert loaded.peft_config["default"].ranks == solved.ranks

    def test_goes_where_the_energy_is(self):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        direction = torch.randn(8)

        def one_channel(model, x):
            low = x * direction[:, None, None]
            return (model[0](low.sum(1, keepdim=True).expand_as(x)) * direction[:, None, None]).sum() + model[1](
                x
            ).square().sum()

        data = [torch.randn(4, 8, 6, 6)]
        config = FloraConfig(budget=0.3, target_modules="all-weights")
        ranks = allocate(model, config, data, one_channel).ranks
        parameters = {name: count_parameters((8, 8, 3, 3), rank) for name, rank in ranks.items()}
        assert ranks["0"][0] == 1  # its gradient has rank 1 in both channel modes
        assert parameters["1"] > 2 * parameters["0"]

    def test_kernel_rank_as_given(self):
        config = FloraConfig(budget=0.3, kernel_r=2, target_modules=["conv", "grouped", "up"])
        ranks = allocate(net(), config, batches(), loss).ranks
        assert {tuple(rank[2:]) for rank in ranks.values()} == {(2, 2)}

    def test_without_a_budget(self):
        with pytest.raises(ValueError, match=r"allocate spends a budget, and config.budget is None"):
            allocate(net(), FloraConfig(r=4, **TARGETS), batches(), loss)

    def test_spectrum_needs_allocate(self):
        config = FloraConfig(budget=0.4, allocation="spectrum", **TARGETS)
        for attempt in (get_peft_model, plan):
            with pytest.raises(
                ValueError, match=r"allocation='spectrum' needs gradients: attach the configuration that"
            ):
                attempt(net(), config)
        assert allocate(net(), config, batches(), loss).ranks
