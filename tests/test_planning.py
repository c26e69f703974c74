"""A plan is what attaching does, found without doing it."""

import copy
import json

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from florapeft import FloraConfig, plan
from florapeft.planning import on_meta, saved_bytes
from florapeft.targets import adapted_targets


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.matrix


class Net(nn.Module):
    """Convolutions of all sorts, a linear layer, an embedding, an attention and a bare matrix."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, groups=16)
        self.norm, self.up = nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.embed, self.attention = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = Inner()
        self.head = nn.Linear(8, 5)

    def forward(self, x, ids):
        x = self.up(self.norm(self.depthwise(self.conv(x)))).flatten(2).mT
        x = self.inner(x) + self.embed(ids)
        return self.head(self.attention(x, x, x)[0])


INPUTS = {"x": torch.randn(2, 3, 16, 16), "ids": torch.zeros(2, 1, dtype=torch.long)}
CONFIGS = [
    {"target_modules": "all-weights", "r": 4},
    {"target_modules": "all-weights", "budget": 0.2},
    {"target_modules": ["conv", "attention"], "target_parameters": ["matrix"], "kernel_r": 2, "bias": "flora_only"},
    {"target_modules": "all-weights", "budget": 0.1, "modules_to_save": ["head"], "save_batch_norm": True},
]


class TestPlan:
    @pytest.mark.parametrize("arguments", CONFIGS)
    @pytest.mark.parametrize("is_on_meta", [False, True])
    def test_is_what_attaching_does_and_changes_nothing(self, arguments, is_on_meta):
        model, config = Net(), FloraConfig(**arguments)
        state, before = copy.deepcopy(model.state_dict()), copy.deepcopy(config)
        found = plan(on_meta(model) if is_on_meta else model, config, inputs=INPUTS)
        assert config == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [type(module).__name__ for module in model.children()] == [
            "Conv2d", "Conv2d", "BatchNorm2d", "ConvTranspose2d", "Embedding", "MultiheadAttention", "Inner",
            "Linear",
        ]  # fmt: skip
        adapted = get_peft_model(model, config)
        assert found.trained == adapted.get_nb_trainable_parameters()[0]
        assert found.parameters == sum(p.numel() for n, p in adapted.named_parameters() if ".flora_" in n)
        assert found.base_parameters == sum(value.numel() for name, value in Net().named_parameters())
        modules = dict(adapted.get_base_model().named_modules())
        targets = adapted_targets(adapted.get_base_model())
        ranks = {target.name: modules[target.module].tuckers("default")[target.weight].rank for target in targets}
        assert {layer.name: layer.rank for layer in found.layers} == ranks
        memory = found.memory
        assert memory.weights == sum({id(t): t.nbytes for t in (*adapted.parameters(), *adapted.buffers())}.values())
        assert memory.gradients == sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
        assert memory.optimizer == 2 * memory.gradients
        # A few tensors that are views with values are copies without.
        assert memory.activations == pytest.approx(saved_bytes(adapted, lambda: adapted.train()(**INPUTS)), rel=1e-3)

    @pytest.mark.parametrize("inputs", [torch.randn(2, 4), (torch.randn(2, 4),), {"input": torch.randn(2, 4)}])
    def test_kinds_of_inputs(self, inputs):
        model = nn.Sequential(nn.Linear(4, 8))
        found = plan(model, FloraConfig(r=2, target_modules=["0"]), inputs=inputs)
        assert found.memory.activations >= 2 * 4 * 4
        assert found.memory.total == sum(
            (found.memory.weights, found.memory.gradients, found.memory.optimizer, found.memory.activations)
        )

    def test_a_forward_that_needs_values_says_so(self):
        class Routed(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = nn.Linear(4, 4)

            def forward(self, x):
                return self.lin(x[x.sum(1).nonzero().squeeze(1)])

        found = plan(Routed(), FloraConfig(r=2, target_modules=["lin"]), inputs=torch.randn(2, 4))
        assert found.memory.activations is None
        assert found.notes[0].startswith("activations are not known: the forward does not run without values (")
        assert str(found).endswith(f"note: {found.notes[0]}")

    def test_is_not_taken_for_training(self, caplog):
        with caplog.at_level("WARNING", logger="florapeft"):
            plan(Net(), FloraConfig(r=1, init_weights="gradient", target_modules="all-weights"), inputs=INPUTS)
        assert not caplog.messages

    def test_masked_text(self):
        config = tf.BertConfig(
            num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=50
        )
        model = tf.AutoModelForSequenceClassification.from_config(config)
        inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8)}
        found = plan(model, FloraConfig(r=2, target_modules="all-weights", task_type="SEQ_CLS"), inputs=inputs)
        assert found.memory.activations > 0
        assert found.skipped == {"classifier": "trained in full, by modules_to_save"}

    def test_skipped_with_reasons(self):
        model = Net()
        model.tied = nn.Linear(8, 8, bias=False)
        model.same = nn.Linear(8, 8, bias=False)
        model.same.weight = model.tied.weight
        found = plan(model, FloraConfig(r=2, target_modules="all-weights", exclude_modules=["embed"]))
        assert found.skipped == {
            "inner.matrix": "parameter of Inner itself",
            "tied": "its weight has other names too",
            "embed": "not selected",
        }
        found = plan(Net(), FloraConfig(budget=300, target_modules=["conv", "up", "head"]))
        assert found.skipped["embed"] == "not selected"
        found = plan(Net(), FloraConfig(budget=60, target_modules=["conv", "up", "head"]))
        assert "the budget does not pay for it" in found.skipped.values()
        found = plan(Net(), FloraConfig(target_modules="all-weights", trainable_token_indices={"embed": [1]}))
        assert found.skipped["embed"] == "some of its rows are trained in full, by trainable_token_indices"

    def test_flops(self):
        model = nn.Sequential(nn.Linear(32, 64), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3, groups=4))
        flops = [layer.flops for layer in plan(model, FloraConfig(r=4, target_modules="all-weights")).layers]
        linear = 3 * (32 * 4 + 4 * 4 + 4 * 64) / (2 * 32 * 64)
        conv = 3 * (16 * 4 + 4 * 4 * 9 + 4 * 32) / (2 * 16 * 32 * 9)
        assert flops == pytest.approx([linear, conv, 0.5])

    def test_json_and_table(self):
        found = plan(Net(), FloraConfig(r=4, target_modules="all-weights"), inputs=INPUTS)
        record = json.loads(json.dumps(found.to_dict()))
        assert record["layers"][0] == {
            "name": "conv", "kind": "Conv2d", "shape": [16, 3, 3, 3], "rank": [4, 3, 3, 3], "parameters": 172,
            "share": 172 / 432, "flops": found.layers[0].flops, "order": 4,
        }  # fmt: skip
        assert record["memory"]["total"] == found.memory.total
        lines = str(found).splitlines()
        assert lines[0].split()[:5] == ["weight", "kind", "shape", "rank", "parameters"]
        assert len(lines[1].split("  ")) >= 6
        assert f"{found.parameters:,} parameters in {len(found.layers)} weights" in str(found)
        assert "memory of training: " in str(found)

    def test_an_adapted_model(self):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloraConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="plan takes a base model, and this one has an adapter already"):
            plan(model, FloraConfig(r=2, target_modules=["0"]))

    def test_what_attaching_would_raise(self):
        with pytest.raises(ValueError, match="not found in the base model"):
            plan(Net(), FloraConfig(target_modules=["nothing"]))
