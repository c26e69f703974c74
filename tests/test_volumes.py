"""benchmarks/volumes.py: the solids are what they say they are, and no image is on two sides of a comparison."""

import accuracy
import pretrained
import pytest
import torch
import volumes
from cases import SETTINGS, Case

from florapeft.train.fitting import WITHIN, trainable

UPRIGHT = torch.eye(3).expand(2, 3, 3)


class TestSplits:
    def test_every_image_is_in_one(self):
        parts = volumes.split_images()
        assert {name: len(part) for name, part in parts.items()} == {
            name: split.images for name, split in volumes.SPLITS.items()
        }
        assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(1797))

    def test_volumes_are_the_same_each_time(self):
        split = volumes.SPLITS["validation"]._replace(views=2)
        first, again = volumes.volumes("validation", split), volumes.volumes("validation", split)
        assert first["images"].shape == (400, 1, 16, 16, 16)
        assert torch.equal(first["images"], again["images"])
        assert torch.equal(first["labels"][:200], first["labels"][200:])
        assert not torch.equal(first["images"][:200], first["images"][200:])


class TestSolids:
    def test_turns(self):
        turn = volumes.turns(500, 60.0, torch.Generator().manual_seed(0))
        torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand_as(turn), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(turn), torch.ones(500))
        degrees = ((turn.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).arccos().rad2deg()
        assert 55 < degrees.max() < 60.01
        assert degrees.min() < 5

    def test_ink_is_height(self):
        ink = torch.stack((torch.full((8, 8), 0.5), torch.ones(8, 8)))
        half, full = volumes.solids(ink, UPRIGHT, is_mould=False)
        inside = slice(4, 12)  # away from the edge, where ink is interpolated to nothing
        high = 2 * volumes.DEPTH / volumes.STEP
        torch.testing.assert_close(half[inside, inside].sum(-1), torch.full((8, 8), high / 2))
        torch.testing.assert_close(full[inside, inside].sum(-1), torch.full((8, 8), high))
        assert half.flip(-1)[inside, inside].argmax(-1).unique().tolist() == [8]  # it stands on a plane

    def test_mould_and_cast_are_a_block(self):
        ink = torch.rand(2, 8, 8)
        ink[:, [0, -1]] = ink[:, :, [0, -1]] = 0  # else a cast reaches half a pixel over the block's edge
        both = volumes.solids(ink, UPRIGHT, False) + volumes.solids(ink, UPRIGHT, True)
        size = (2 * volumes.HALF) ** 2 * 2 * volumes.DEPTH
        torch.testing.assert_close(both.sum((1, 2, 3)) * volumes.STEP**3, torch.full((2,), size))

    def test_a_quarter_turn_is_that_of_the_voxels(self):
        ink = torch.rand(1, 8, 8)
        quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
        turned = volumes.solids(ink, quarter, is_mould=True)
        upright = volumes.solids(ink, UPRIGHT[:1], is_mould=True)
        torch.testing.assert_close(turned, upright.rot90(1, (1, 2)), atol=1e-5, rtol=0)


@pytest.fixture
def case(monkeypatch, tmp_path):
    """The task, few of its volumes, and a network that was not pretrained."""
    monkeypatch.setattr(pretrained, "CACHE", tmp_path)
    monkeypatch.setattr(volumes, "pretrain", lambda model: None)
    splits = {name: split._replace(views=1) for name, split in volumes.SPLITS.items()}
    monkeypatch.setattr(volumes, "SPLITS", splits)
    case = Case("volumes", SETTINGS["volumes"], None)
    accuracy.cut_short(case)
    return case


class TestTask:
    def test_the_head_alone_is_new(self, case):
        known, *models = volumes.network_of_casts(), case.task.model(0), case.task.model(0), case.task.model(1)
        heads = [model.linear.weight for model in (known, *models)]
        assert torch.equal(heads[1], heads[2])
        assert not any(torch.equal(heads[1], other) for other in (heads[0], heads[3]))
        assert all(torch.equal(known.blocks[2].conv2.weight, model.blocks[2].conv2.weight) for model in models)
        assert 0 <= case.task.facts()["source_accuracy"] <= 1

    @pytest.mark.parametrize("method", ["LoRA", "FLoRA"])
    def test_all_convolutions_are_adapted_within_the_budget(self, case, method):
        assert len(case.layers) == sum(isinstance(part, torch.nn.Conv3d) for part in case.task.model(0).modules())
        model, _ = accuracy.METHODS[method](case, case.model(0), 0)
        head = sum(parameter.numel() for parameter in case.task.model(0).linear.parameters())
        assert abs((trainable(model) - head) / case.goal - 1) <= WITHIN

    def test_methods_without_3d_convolutions_are_left_out(self, case):
        with pytest.raises(accuracy.NothingToTrainError, match="Conv3d"):
            accuracy.fitted("loha", case, case.model(0))
