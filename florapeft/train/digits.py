"""The data and the network of the built-in job: from one digit to the middle one of three.

The images are scikit-learn's handwritten digits, 1,797 real ones of 8 × 8 pixels, which come with that package. The
shipped network was pretrained on single digits 0 to 4, white on black (`scripts/pretrain_digits.py`); it is adapted to
name the middle one of three digits 0 to 9, black on white. Pretraining and the target task share no image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

TASKS = ("pretraining", "target")
SPLITS = ("train", "validation", "test")

# Rates and rank have the best validation accuracy of benchmarks/results/builtin_settings.json, which
# `scripts/pretrain_digits.py --choose` measures. `train` holds TrainingArguments; the rate is one per method.
BUILTIN_SETTINGS: dict[str, dict[str, Any]] = {
    "adapter": {"target_modules": "all-weights", "r": 4, "modules_to_save": ["classifier"]},
    "train": {
        "learning_rate": {"head": 1e-1, "flora": 3e-2, "full": 2e-3},
        "num_train_epochs": 12,
        "per_device_train_batch_size": 64,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
    },
}

_SIDE = 8  # pixels of a digit's side
_SEED = 20240523  # of the splits and of each digit's neighbours
_SHARES = (0.60, 0.15, 0.25)  # of train, validation and test
_VIEWS = {"train": 2, "validation": 3, "test": 3}  # a target image appears so often, each time with other neighbours


@dataclass(frozen=True)
class DigitsTask:
    """A task on the digits.

    Attributes:
        name: "pretraining" or "target".
        labels: what each class is called.
        train, validation, test: `pixel_values`, float32 of shape (n, 1, 8, 24) from -1 (black) to 1 (white), and
            `labels`, int64 of shape (n,).
    """

    name: str
    labels: list[str]
    train: dict[str, torch.Tensor]
    validation: dict[str, torch.Tensor]
    test: dict[str, torch.Tensor]


def builtin_model_path() -> Path:
    """The folder of the pretrained network: config, weights, and `card.json`, which says how it came to be."""
    return Path(__file__).parent / "builtin"


def load_digits_task(name: str) -> DigitsTask:
    """One of the two tasks, always with the same images in the same order.

    "pretraining" is single digits 0 to 4, white on black, from half of their images. "target" is the middle one of
    three digits 0 to 9, black on white, from all other images; the neighbours are drawn from the same split, so no part
    of a test image is seen in training.

    Raises:
        ValueError: there is no task of this name.
    """
    if name not in TASKS:
        raise ValueError(f"no digits task is called {name!r}; there are {' and '.join(TASKS)}")
    images, digits = _digits()
    splits = split_indices()[name]
    if name == "pretraining":
        data = {split: _single(images, digits, indices) for split, indices in splits.items()}
    else:
        data = {split: _triples(images, digits, splits[split], split) for split in SPLITS}
    labels = [str(digit) for digit in range(5 if name == "pretraining" else 10)]
    return DigitsTask(name, labels, **data)


def split_indices() -> dict[str, dict[str, np.ndarray]]:
    """Which of scikit-learn's images belong to which split of which task; no image belongs to two.

    Returns:
        `{task: {split: indices}}`, each of shape (n,), sorted; classes have the same shares in every split.
    """
    import numpy as np

    _, digits = _digits()
    random = np.random.RandomState(_SEED)  # its stream is frozen by NumPy's policy, unlike a Generator's
    parts: dict[str, dict[str, list[np.ndarray]]] = {task: {split: [] for split in SPLITS} for task in TASKS}
    for digit in range(10):
        shuffled = random.permutation(np.flatnonzero(digits == digit))
        pretraining = len(shuffled) // 2 if digit < 5 else 0
        for task, indices in zip(TASKS, np.split(shuffled, [pretraining]), strict=True):
            ends = np.round(np.cumsum(_SHARES[:-1]) * len(indices)).astype(int)
            for split, part in zip(SPLITS, np.split(indices, ends), strict=True):
                parts[task][split].append(part)
    return {
        task: {split: np.sort(np.concatenate(found)) for split, found in splits.items()}
        for task, splits in parts.items()
    }


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, float32 of shape (1797, 8, 8) from 0 (black) to 1 (white), and the digits (1797,) that they show."""
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target


def _single(images: np.ndarray, digits: np.ndarray, indices: np.ndarray) -> dict[str, torch.Tensor]:
    """Each image once, white on black, in the middle of an otherwise black canvas."""
    import numpy as np

    canvas = np.zeros((len(indices), _SIDE, 3 * _SIDE), dtype=np.float32)
    canvas[:, :, _SIDE : 2 * _SIDE] = images[indices]
    return _tensors(canvas, digits[indices])


def _triples(images: np.ndarray, digits: np.ndarray, indices: np.ndarray, split: str) -> dict[str, torch.Tensor]:
    """Each image several times, black on white, between two neighbours of the same split."""
    import numpy as np

    random = np.random.RandomState(_SEED + 1 + SPLITS.index(split))
    middle = np.repeat(indices, _VIEWS[split])
    left, right = random.choice(indices, size=(2, len(middle)))
    canvas = np.concatenate([images[left], images[middle], images[right]], axis=2)
    return _tensors(1 - canvas, digits[middle])


def _tensors(canvas: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    import torch

    return {
        "pixel_values": torch.from_numpy(2 * canvas - 1).unsqueeze(1),
        "labels": torch.from_numpy(labels).long(),
    }
