"""The ranks of a model's targets: as configured, by pattern, by name, and from a budget."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from florapeft import FloraConfig


def mlp():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4))


class TestBudget:
    @pytest.mark.parametrize("budget", [200, 0.2, 0.3])
    @pytest.mark.parametrize("targets", [["0", "2"], "all-weights"])
    def test_of_a_model(self, budget, targets):
        base = mlp()
        count = sum(p.numel() for p in base.parameters())
        limit = budget if isinstance(budget, int) else int(budget * count)
        model = get_peft_model(base, FloraConfig(budget=budget, target_modules=targets))
        assert limit - 51 < model.get_nb_trainable_parameters()[0] <= limit  # a rank takes a few more than 50
        assert model.peft_config["default"].ranks.keys() == {"0", "2"}

    def test_share_is_of_the_base_model_with_tied_weights_once(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.lin, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False)
                self.head.weight = self.embed.weight

        limit = int(0.1 * (50 * 8 + 8 * 8 + 8))
        model = get_peft_model(Tied(), FloraConfig(budget=0.1, target_modules=["lin"]))
        assert model.peft_config["default"].ranks == {"lin": [2, 2]}  # 4 + 2 * 16 = 36 of 47; rank 3 takes 57
        assert limit == 47

    def test_kernels_are_the_solvers_unless_given(self):
        base = nn.Sequential(nn.Conv2d(32, 32, 5), nn.Conv2d(32, 32, 5))
        ranks = {}
        for kernel_r in (None, 2):
            model = get_peft_model(base, FloraConfig(budget=0.1, kernel_r=kernel_r, target_modules="all-weights"))
            ranks[kernel_r] = model.peft_config["default"].ranks["1"][2:]
            model.unload()
        assert ranks == {None: [3, 3], 2: [2, 2]}

    def test_one_configuration_serves_several_models(self):
        config, models = FloraConfig(budget=200, target_modules="all-weights"), []
        for budget in (200, 400):
            config.budget = budget
            models.append(get_peft_model(mlp(), config))
            assert budget - 51 < models[-1].get_nb_trainable_parameters()[0] <= budget
            assert models[-1].peft_config["default"].target_modules == {"0", "2"}
        other = get_peft_model(nn.Sequential(nn.Conv2d(9, 8, 3)), config)
        assert other.peft_config["default"].ranks.keys() == {"0"}
        models[0].add_adapter("second", config)
        first, second = models[0].peft_config.values()
        assert first.ranks != second.ranks
        assert second.ranks == models[1].peft_config["default"].ranks
        config.ranks = {"0": [2, 2]}  # asked for since
        assert get_peft_model(mlp(), config).peft_config["default"].ranks == {"0": [2, 2]}

    def test_a_configuration_that_one_model_refuses_serves_another(self):
        config = FloraConfig(budget=20, target_modules="all-weights", modules_to_save=["heads"])
        before = config.to_dict()
        base = nn.ModuleDict({"lin": nn.Linear(4, 4), "heads": nn.ModuleDict({"x": nn.Linear(4, 4)})})
        with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
            get_peft_model(base, config)
        assert config.to_dict() == before
        config.modules_to_save = None
        assert get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).peft_config["default"].ranks.keys() == {"0"}

    def test_after_a_model_with_experts_one_without(self):
        config = FloraConfig(r=2, target_modules="all-weights")
        model = get_peft_model(nn.ModuleDict({"lin": nn.Linear(4, 4), "block": Experts()}), config)
        assert model.peft_config["default"].target_parameters == ["block.stack"]
        other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        assert other.peft_config["default"].target_parameters is None

    @pytest.mark.parametrize(
        ("task", "network", "head"),
        [
            ("TOKEN_CLS", "BertForTokenClassification", "classifier"),
            ("QUESTION_ANS", "BertForQuestionAnswering", "qa_outputs"),
            ("SEQ_CLS", "BertForSequenceClassification", "classifier"),
        ],
    )
    def test_heads_that_peft_adds_are_saved(self, task, network, head):
        config = FloraConfig(budget=500, target_modules="all-weights", task_type=task)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        for _ in range(2):
            net = getattr(transformers, network)(transformers.BertConfig(vocab_size=20, **sizes))
            model = get_peft_model(net, config)
            assert head in model.peft_config["default"].modules_to_save
            assert any(f"{head}.modules_to_save." in name for name, _ in model.named_parameters())

    def test_says_what_it_cannot_spend(self, caplog):
        with caplog.at_level("WARNING", logger="florapeft"):
            get_peft_model(nn.Sequential(nn.Linear(8, 8)), FloraConfig(budget=47, target_modules=["0"]))
        assert [record.message for record in caplog.records] == [
            "Of a budget of 47 parameters 36 are used: the next rank takes 21 more"
        ]

    @pytest.mark.parametrize("targets", [["0", "2"], "all-weights"])
    def test_leaves_out_what_it_cannot_pay(self, targets, caplog, tmp_path):
        with caplog.at_level("WARNING", logger="florapeft"):
            model = get_peft_model(mlp(), FloraConfig(budget=60, target_modules=targets, init_weights=False))
        assert [record.message for record in caplog.records] == [
            "A budget of 60 parameters is too small for all 2 targets, which take 92 at least: not adapted are 2"
        ]
        assert model.peft_config["default"].ranks == {"0": [1, 1]}
        assert type(model.base_model.model[2]) is nn.Linear
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(mlp(), tmp_path)
        assert torch.equal(
            loaded.base_model.model[0].get_delta_weight("default"),
            model.base_model.model[0].get_delta_weight("default"),
        )

    def test_too_small_for_any_leaves_the_model_alone(self):
        base = nn.Sequential(nn.Linear(20, 30))
        with pytest.raises(
            ValueError, match="a budget of 50 parameters is too small: of 1 targets, the cheapest takes 51"
        ):
            get_peft_model(base, FloraConfig(budget=50, target_modules=["0"]))
        assert type(base[0]) is nn.Linear
        assert torch.equal(base(torch.ones(1, 20)), base[0](torch.ones(1, 20)))

    def test_above_the_model(self):
        base = nn.Sequential(nn.Linear(20, 30))
        with pytest.raises(ValueError, match="a budget of 631 parameters is more than the 630 of the base model"):
            get_peft_model(base, FloraConfig(budget=631, target_modules=["0"]))
        assert type(base[0]) is nn.Linear


class TestOfAModel:
    def test_count_mismatch_names_the_module(self):
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        with pytest.raises(ValueError, match=r"rank \[2, 2\] has 2 entries, but the weight of '0' has order 4"):
            get_peft_model(base, FloraConfig(r=[2, 2], target_modules=["0", "2"]))
        assert type(base[0]) is nn.Conv2d

    def test_pattern_overrides(self):
        base = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10), nn.Conv1d(10, 12, 3))
        config = FloraConfig(r=4, target_modules=["0", "1", "2"], rank_pattern={"1": 6, "2": [3, 2, 1]})
        model = get_peft_model(base, config)
        ranks = [layer.tucker("default").rank for layer in model.base_model.model]
        assert ranks == [(4, 4), (6, 6), (3, 2, 1)]

    def test_pattern_by_regular_expression_and_suffix(self):
        base = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(9, 9), "k": nn.Linear(9, 9)}), "q": nn.Linear(9, 9)})
        config = FloraConfig(r=4, target_modules=["q", "k"], rank_pattern={r"a\.q": 2, "k": 3, "^q": 5})
        model = get_peft_model(base, config).base_model.model
        assert [layer.tucker("default").rank[0] for layer in (model.a.q, model.a.k, model.q)] == [2, 3, 5]

    def test_listed_ranks_alone_are_adapted(self):
        base = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
        model = get_peft_model(base, FloraConfig(target_modules=["0", "1"], ranks={"1": [3, 2]}))
        assert type(model.base_model.model[0]) is nn.Linear
        assert model.base_model.model[1].tucker("default").rank == (3, 2)

    def test_ranks_of_an_unknown_module(self):
        base = nn.Sequential(nn.Linear(20, 30))
        with pytest.raises(ValueError, match=r"ranks names 1 module that this model does not have, .*: 7"):
            get_peft_model(base, FloraConfig(target_modules=["0"], ranks={"0": [3, 2], "7": [1, 1]}))
        assert type(base[0]) is nn.Linear

    def test_caps_are_reported_once(self, caplog):
        base = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10), nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 40))
        with caplog.at_level("WARNING", logger="florapeft"):
            get_peft_model(base, FloraConfig(r=16, target_modules="all-weights"))
        (record,) = caplog.records
        assert record.message == (
            "Ranks above a mode's size are capped: "
            "1 mode 0: 16 -> 10; 2 mode 0: 16 -> 4; 2 mode 1: 16 -> 10; and 3 more"
        )

    def test_no_caps_no_message(self, caplog):
        with caplog.at_level("WARNING", logger="florapeft"):
            get_peft_model(nn.Sequential(nn.Linear(20, 30)), FloraConfig(r=20, target_modules="all-weights"))
        assert not caplog.records
