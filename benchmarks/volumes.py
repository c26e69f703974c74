"""Weights of order 5: a 3-D network that knows casts of handwritten digits, adapted to their moulds, tipped over.

The digits are scikit-learn's, 1,797 real ones of 8 × 8 pixels. Each becomes a solid in 16 × 16 × 16 voxels, as thick
where the ink is as the ink is dark. The network is pretrained here to name these casts, upright but for small turns. It
is adapted to name moulds, blocks from which the cast is missing, turned by up to 60 degrees about any axis. The two
tasks share no image.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, NamedTuple

import pretrained
import torch
import torch.nn.functional as F
from tasks import Batch, Task, fit, warm_cosine
from torch import Tensor, nn

SIDE = 16  # voxels of a volume, along each axis
STEP = 2 / SIDE  # of a voxel, where the volume reaches from -1 to 1
HALF, DEPTH = 2 / 3, 1 / 3  # half of the block's sides; it fits into the unit sphere, and so at any turn
NOISE = 0.2  # standard deviation of what is added to every voxel
WIDTHS = (16, 32, 64)
EPOCHS, BATCH_SIZE, RATE = 12, 64, 3e-3  # of the training on casts
CLASSES = 10


class Split(NamedTuple):
    """How many images a split has, how often each appears, and turned by up to how many degrees, cast or as a mould."""

    images: int
    views: int
    degrees: float
    is_mould: bool


SPLITS = {
    "pretraining": Split(800, 4, 15.0, False),
    "train": Split(400, 3, 60.0, True),
    "validation": Split(200, 3, 60.0, True),
    "test": Split(397, 3, 60.0, True),
}


class Moulds(Task):
    """Name the digit whose mould a volume holds."""

    def model(self, seed: int) -> nn.Module:
        """The network that knows casts, with a new head drawn from `seed`."""
        model = network_of_casts()
        torch.manual_seed(seed)
        model.linear.reset_parameters()
        return model

    def facts(self) -> dict[str, Any]:
        """How well the network, with the head that it came with, knows casts of images that are new to it."""
        casts = volumes("test", SPLITS["test"]._replace(degrees=SPLITS["pretraining"].degrees, is_mould=False))
        return {"source_accuracy": self.score(network_of_casts(), casts)}


def moulds(data: Path) -> Moulds:
    """Moulds of digits; needs no `data`."""
    parts = {name: volumes(name, SPLITS[name]) for name in ("train", "validation", "test")}
    return Moulds("volumes", data, "linear", parts["train"], parts["validation"], parts["test"], "accuracy")


def split_images() -> dict[str, Tensor]:
    """Which of scikit-learn's images belong to which split, always the same; no image belongs to two."""
    counts = [split.images for split in SPLITS.values()]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    return dict(zip(SPLITS, order.split(counts), strict=True))


def volumes(name: str, split: Split) -> Batch:
    """The images of a split as volumes, float32 of shape `(n, 1, 16, 16, 16)`, and which digits they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = split_images()[name].repeat(split.views)
    ink = torch.from_numpy(digits.images).float()[chosen] / 16
    generator = torch.Generator().manual_seed(1 + list(SPLITS).index(name))
    turn = turns(len(ink), split.degrees, generator)
    solid = torch.cat(
        [solids(*part, is_mould=split.is_mould) for part in zip(ink.split(256), turn.split(256), strict=True)]
    )
    noise = NOISE * torch.randn(solid.shape, generator=generator)
    return {"images": (solid + noise).unsqueeze(1), "labels": torch.from_numpy(digits.target)[chosen].long()}


def turns(count: int, degrees: float, generator: torch.Generator) -> Tensor:
    """Rotations about axes of any direction by angles up to `degrees`, shape `(count, 3, 3)`.

    Source: Rodrigues' formula, R = I + sin(a) K + (1 - cos(a)) K², where K v is the product of the axis and v.
    """
    axis = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    angle = math.radians(degrees) * torch.rand(count, 1, 1, generator=generator)
    cross = torch.linalg.cross(axis[:, None], torch.eye(3)[None]).mT
    return torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def solids(ink: Tensor, turn: Tensor, is_mould: bool) -> Tensor:
    """What each voxel holds of a solid, from 0 to 1: ink as height over a plane, or a block without it.

    Args:
        ink: from 0 to 1, shape `(n, rows, columns)`; between pixels it is interpolated.
        turn: rotations of shape `(n, 3, 3)`.

    Returns:
        Shape `(n, 16, 16, 16)`.
    """
    line = STEP * (torch.arange(SIDE) + 0.5) - 1
    voxels = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).view(-1, 3)
    y, x, z = (voxels @ turn).unbind(-1)  # where each lies before the turn: along rows, columns, and the height
    height = F.grid_sample(ink[:, None], torch.stack((x, y), -1)[:, None] / HALF, align_corners=False)[:, 0, 0]
    solid = _covered(z, -DEPTH, -DEPTH + 2 * DEPTH * height)
    if is_mould:
        solid = _covered(x, -HALF, HALF) * _covered(y, -HALF, HALF) * _covered(z, -DEPTH, DEPTH) - solid
    return solid.clamp(0, 1).view(-1, SIDE, SIDE, SIDE)


def _covered(at: Tensor, low: float, high: float | Tensor) -> Tensor:
    """The share of a voxel's width around `at` that lies between `low` and `high`."""
    top = (at + STEP / 2).minimum(torch.as_tensor(high))
    return ((top - (at - STEP / 2).clamp(min=low)) / STEP).clamp(min=0)


class Network(nn.Module):
    """A residual network of 3-D convolutions: one, and a block of two for each width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(WIDTHS[0])
        self.blocks = nn.Sequential(*map(_Block, (WIDTHS[0], *WIDTHS), WIDTHS))
        self.linear = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 1, 16, 16, 16)` to `(n, 10)`."""
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3, 4)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm3d(outputs), nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(kept, (0, 0, 0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


def network_of_casts() -> nn.Module:
    """The network that was trained on casts; on the first use it is, in less than a minute of one core."""
    return pretrained.load(Network, pretrain, "volumes", _RECIPE)


def pretrain(model: nn.Module) -> None:
    """Trains it on casts, in place."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would give other weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    fit(model.train(), optimizer, volumes("pretraining", SPLITS["pretraining"]), EPOCHS, BATCH_SIZE, _loss)
    torch.set_num_threads(threads)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


# Read once: an edit while this runs must not pass off these weights as its own.
_RECIPE = (Path(__file__).read_text(), inspect.getsource(fit), inspect.getsource(warm_cosine), torch.__version__)
