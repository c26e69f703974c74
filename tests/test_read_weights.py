"""Weights that the module around a layer reads, and other ways past a layer's forward: adapted equals merged."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from florapeft import FloraConfig, FloraLayer


class Read(nn.Module):
    """Reads its layer's weight and never calls it, as fused kernels do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, x):
        return F.conv1d(x, self.conv.weight.squeeze(1)[:, None], self.conv.bias, groups=4)


class Codebook(nn.Module):
    """Reads it and calls it, as vector quantisers do."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(6, 4)

    def forward(self, x):
        distances = (x.mT[:, :, None] - self.codes.weight).square().sum(-1)
        return self.codes(distances.argmin(-1)).mT + distances.mean()


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.ModuleList(nn.Embedding(1, 4) for _ in range(2))

    def forward(self, x):
        return x * self.points[0].weight[..., None] + self.points[1].weight[..., None]


class OtherWay(nn.Linear):
    def twice(self, x):
        return 2 * self.forward(x)


class ByMethod(nn.Module):
    """Calls a method of the layer that is not its forward."""

    def __init__(self):
        super().__init__()
        self.lin = OtherWay(5, 5)

    def forward(self, x):
        return self.lin.twice(x) + self.lin(x)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x):
        return self.lin(input=x)


class Metadata(nn.Module):
    """As T5: what is read has nothing to do with the values."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x):
        if isinstance(self.lin.weight, torch.Tensor) and x.dtype != self.lin.weight.dtype:
            x = x.to(self.lin.weight.dtype)
        return self.lin(x)


WAYS = {
    "read": Read,
    "codebook": Codebook,
    "listed": Listed,
    "method": ByMethod,
    "keyword": ByKeyword,
    "type": Metadata,
}
X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))


def build(way):
    torch.manual_seed(0)
    return nn.Sequential(WAYS[way]()).eval()


def attach(way, **given):
    return get_peft_model(build(way), FloraConfig(**{"r": 2, "target_modules": "all-weights", **given}))


@pytest.mark.parametrize("way", WAYS)
class TestAdaptedEqualsMerged:
    def test_outputs(self, way, tmp_path):
        model = attach(way, init_weights=False)
        expected = model(X)
        assert not torch.allclose(expected, build(way)(X))
        with model.disable_adapter():
            assert_close(model(X), build(way)(X))
        model.save_pretrained(tmp_path)
        assert_close(PeftModel.from_pretrained(build(way), tmp_path)(X), expected)
        model.merge_adapter()
        assert_close(model(X), expected)
        model.unmerge_adapter()
        assert_close(model(X), expected)
        assert_close(model.merge_and_unload()(X), expected)

    def test_disabling_takes_out_what_is_merged(self, way):
        model = attach(way, init_weights=False)
        model.merge_adapter()
        with model.disable_adapter():
            assert_close(model(X), build(way)(X))
            assert not any(module.merged for module in model.modules() if isinstance(module, FloraLayer))

    def test_starts_at_the_base_and_everything_has_a_gradient(self, way):
        model = attach(way)
        assert_close(model(X), build(way)(X), rtol=0, atol=0)
        model = attach(way, init_weights=False)
        model(X).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_is_read(self, way):
        layers = [module for module in attach(way).modules() if isinstance(module, FloraLayer)]
        assert [layer.is_read for layer in layers] == [way in ("read", "codebook", "listed")] * len(layers)


@pytest.mark.parametrize("way", ["read", "codebook"])
def test_one_weight_cannot_serve_a_mixed_batch(way):
    model = attach(way)
    with pytest.raises(NotImplementedError, match=r"whose weight the module around it reads: one weight cannot serve"):
        model(X, adapter_names=["default", "__base__"])
    assert_close(model(X), build(way)(X))


class Frozen(nn.Embedding):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Indexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    @torch.inference_mode()
    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize(
    ("module", "name", "cls"), [(Frozen(3, 4), "odd", "Frozen"), (Indexer(), "odd.lin", "Indexer")]
)
def test_what_runs_without_gradients_is_left_out(module, name, cls):
    base = nn.ModuleDict({"odd": module, "lin": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=rf"{name} \({cls}.forward runs without gradients\)"):
        get_peft_model(base, FloraConfig(r=2, target_modules=[name]))
    model = get_peft_model(base, FloraConfig(r=2, target_modules="all-weights")).base_model.model
    assert {n for n, m in model.named_modules() if isinstance(m, FloraLayer)} == {"lin"}
