"""Ranks: from what a user writes to one number per mode, and what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from florapeft import FloraConfig
from florapeft.rank import cap_rank, count_parameters, resolve_rank, spend_uniformly, validate_rank

CONV = (32, 16, 3, 5)


class TestValidate:
    @pytest.mark.parametrize("rank", [1, 64, [1], [4, 4, 3, 3], (2, 2)])
    def test_accepts(self, rank):
        validate_rank(rank, "r")

    @pytest.mark.parametrize("rank", [True, 2.0, "8", None, [2, 1.5], [2, True], [[2]], float("nan"), {2}])
    def test_not_integers(self, rank):
        with pytest.raises(TypeError, match=r"^some_name must be a positive integer or one per mode, got "):
            validate_rank(rank, "some_name")

    @pytest.mark.parametrize("rank", [0, -1, [], (), [4, 0], [4, -4]])
    def test_not_positive(self, rank):
        with pytest.raises(ValueError, match=r"^some_name must be a positive integer or one per mode, got "):
            validate_rank(rank, "some_name")


class TestResolve:
    @pytest.mark.parametrize(
        ("shape", "r", "kernel_r", "channel_modes", "expected"),
        [
            ((32, 16), 8, None, (1, 0), (8, 8)),
            ((32, 16), (8, 4), None, (1, 0), (8, 4)),
            ((32, 16), 8, 2, (1, 0), (8, 8)),
            (CONV, 8, None, (1, 0), (8, 8, 3, 5)),
            (CONV, 8, 2, (1, 0), (8, 8, 2, 2)),
            (CONV, (4, 3, 2, 1), None, (1, 0), (4, 3, 2, 1)),
            (CONV, [4, 3, 2, 1], 5, (1, 0), (4, 3, 2, 1)),
            (CONV, 64, 7, (1, 0), (64, 64, 7, 7)),  # capping is another step
            ((32, 16, 3), 8, 1, (0, 1), (8, 8, 1)),
            ((32, 16, 3, 3, 3), 8, 1, (0, 1), (8, 8, 1, 1, 1)),
        ],
    )
    def test_one_rank_per_mode(self, shape, r, kernel_r, channel_modes, expected):
        assert resolve_rank(shape, r, kernel_r, channel_modes, "layer") == expected

    @pytest.mark.parametrize("r", [(8,), (8, 8, 3), [8] * 5])
    def test_wrong_count_names_the_target(self, r):
        message = (
            rf"rank .* has {len(r)} entries, but the weight of 'stage.0.conv' has order 4 \(shape \(32, 16, 3, 5\)\): "
            "give an int, or one rank per mode for targets of one order only"
        )
        with pytest.raises(ValueError, match=message):
            resolve_rank(CONV, r, None, (1, 0), "stage.0.conv")

    @pytest.mark.parametrize(
        ("rank", "expected"),
        [((8, 8, 3, 3), (8, 8, 3, 3)), ((64, 8, 9, 5), (32, 8, 3, 5)), ((99, 99, 99, 99), CONV)],
    )
    def test_cap(self, rank, expected):
        assert cap_rank(rank, CONV) == expected


class TestCount:
    @pytest.mark.parametrize(
        ("shape", "rank", "expected"),
        [
            ((256, 256), (16, 16), 16 * 16 + 2 * 256 * 16),
            ((256, 256, 3, 3), (16, 16, 2, 2), 9228),  # as counted in the notes on the method
            ((256, 256, 3, 3), (16, 16, 3, 3), 16 * 16 * 9 + 2 * 256 * 16),
            ((8, 4), (8, 2), 8 * 2 + 4 * 2),
            ((8, 4), (8, 4), 32),
            ((8,), (8,), 8),
        ],
    )
    def test_literal(self, shape, rank, expected):
        assert count_parameters(shape, rank) == expected

    @pytest.mark.parametrize(
        ("layer", "r", "kernel_r"),
        [
            (nn.Linear(12, 7), 3, None),
            (nn.Linear(12, 7), 9, None),
            (nn.Conv2d(8, 6, 3), 4, 2),
            (nn.Conv2d(8, 6, 3), 4, None),
            (nn.Conv2d(8, 8, 3, groups=8), 4, None),
            (nn.ConvTranspose3d(6, 4, (1, 2, 3)), 3, 1),
            (nn.Embedding(20, 6), 5, None),
        ],
    )
    def test_is_what_an_adapter_has(self, layer, r, kernel_r):
        shape = layer.weight.shape
        model = get_peft_model(nn.Sequential(layer), FloraConfig(r=r, kernel_r=kernel_r, target_modules=["0"]))
        rank = cap_rank(resolve_rank(shape, r, kernel_r, (0, 1), "0"), shape)
        assert count_parameters(shape, rank) == model.get_nb_trainable_parameters()[0]


SHAPES = {"linear": (20, 10), "conv": CONV, "head": (2, 20)}
MODES = {"linear": (1, 0), "conv": (1, 0), "head": (1, 0)}


def total(ranks, shapes=SHAPES):
    return sum(count_parameters(shapes[name], rank) for name, rank in ranks.items())


def uniform(r, kernel_r=None, shapes=SHAPES):
    return {
        name: tuple(min(d, r if mode < 2 else kernel_r or d) for mode, d in enumerate(shape))
        for name, shape in shapes.items()
    }


class TestBudget:
    @pytest.mark.parametrize("budget", [150, 300, 1000, 2000, 2900])
    @pytest.mark.parametrize("kernel_r", [None, 1, 2])
    def test_is_the_largest_rank_that_fits(self, budget, kernel_r):
        ranks = spend_uniformly(SHAPES, MODES, budget, kernel_r)
        affordable = [r for r in range(1, 40) if total(uniform(r, kernel_r)) <= budget]
        assert ranks == uniform(affordable[-1], kernel_r)

    def test_more_than_everything(self):
        assert spend_uniformly(SHAPES, MODES, 10**9) == SHAPES

    def test_too_small_says_what_it_takes(self):
        least = total(uniform(1))
        assert spend_uniformly(SHAPES, MODES, least) == uniform(1)
        message = (
            f"a budget of {least - 1} parameters is too small: the least that 3 targets take is {least}; "
            "raise the budget, target fewer modules, or lower kernel_r"
        )
        with pytest.raises(ValueError, match=message):
            spend_uniformly(SHAPES, MODES, least - 1)

    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4),
        st.integers(1, 4000),
    )
    def test_never_over_and_never_a_step_short(self, shapes, budget):
        shapes = {str(n): shape for n, shape in enumerate(shapes)}
        modes = dict.fromkeys(shapes, (0, 1))
        affordable = [r for r in range(1, 41) if total(uniform(r, shapes=shapes), shapes) <= budget]
        try:
            ranks = spend_uniformly(shapes, modes, budget)
        except ValueError:
            assert not affordable
        else:
            assert total(ranks, shapes) <= budget
            assert ranks == uniform(affordable[-1], shapes=shapes)

    @pytest.mark.parametrize("budget", [100, 0.1, 0.3])
    def test_of_a_model(self, budget):
        base = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        count = sum(p.numel() for p in base.parameters())
        limit = budget if isinstance(budget, int) else int(budget * count)
        config = FloraConfig(budget=budget, target_modules=["0", "2"])
        model = get_peft_model(base, config)
        assert model.get_nb_trainable_parameters()[0] <= limit
        r = model.peft_config["default"].ranks["0"][0]
        assert model.peft_config["default"].ranks == {"0": [r, r], "2": [r, r]}
        bigger = FloraConfig(r=r + 1, target_modules=["0", "2"])
        fresh = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        assert get_peft_model(fresh, bigger).get_nb_trainable_parameters()[0] > limit

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

    def test_a_whole_mode_can_be_cheaper_than_rank_1(self):
        shapes, modes = {"a": (2, 2)}, {"a": (0, 1)}  # rank 1 takes 1 + 2 + 2, rank 2 only its core of 4
        assert spend_uniformly(shapes, modes, 4) == {"a": (2, 2)}

    def test_too_small_for_a_model_leaves_it_alone(self):
        base = nn.Sequential(nn.Linear(20, 30))
        with pytest.raises(ValueError, match=r"a budget of 50 parameters is too small: the least that .* is 51"):
            get_peft_model(base, FloraConfig(budget=50, target_modules=["0"]))
        assert type(base[0]) is nn.Linear
        assert torch.equal(base(torch.ones(1, 20)), base[0](torch.ones(1, 20)))


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
