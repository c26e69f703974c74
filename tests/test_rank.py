"""Ranks: from what a user writes to one number per mode, and what they cost."""

import pytest
from peft import get_peft_model
from torch import nn

from florapeft import FloraConfig
from florapeft.rank import cap_rank, count_parameters, resolve_rank, validate_rank

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
