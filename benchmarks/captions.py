"""Two modalities: images meet captions. ResNet-20 and MiniLM, adapted together, and classes never trained on.

Each encoder comes pretrained on data of its own kind, so nothing relates images to texts before. A new head maps the
features of images into the space of MiniLM's sentences, where the names of classes that were never trained on have a
meaning too: trained on 60 classes of CIFAR-100, the pair tells 20 others apart by their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tasks import Batch, Task, cifar100, minilm, resnet20_of_cifar10
from torch import Tensor, nn

TEMPLATES = ("a photo of a {}", "photo of a {}", "a picture of a {}", "an image of a {}")
SEEN_IMAGES = 20  # of every training class, in the retrieval of captions


class Classes(NamedTuple):
    """Disjoint classes: to train on, to choose rates by, to report."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split_classes(count: int = 100, validation: int = 20, test: int = 20) -> Classes:
    """The same split of `count` classes at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return Classes(*(part.sort().values for part in order.split([count - validation - test, validation, test])))


class Head(nn.Module):
    """Maps images into the space of texts; the logits are cosines there, times a number that is learned."""

    def __init__(self, image: int, text: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(image), nn.Linear(image, text)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """`(images, image)` and `(texts, text)` to `(images, texts)`."""
        images = F.normalize(self.project(self.norm(images)), dim=-1)
        return self.log_scale.exp() * images @ F.normalize(texts, dim=-1).mT


class Pair(nn.Module):
    """An encoder of images, to `(images, width)`, one of texts from transformers, and their head."""

    def __init__(self, image: nn.Module, text: nn.Module, head: Head) -> None:
        super().__init__()
        self.image, self.text, self.head = image, text, head

    def forward(self, images: Tensor, captions: Batch) -> Tensor:
        """The logits `(images, captions)`; a text's features are the mean over its tokens."""
        tokens = self.text(**captions).last_hidden_state
        mask = captions["attention_mask"][..., None]
        features = torch.cat([self.image(chunk) for chunk in images.split(250)])
        return self.head(features, (tokens * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Captions(Task):
    """In every split, `labels` are classes and `templates` the templates that images have in training.

    `seen` has other images of the training classes; `captions` the tokens of all, `(classes, templates, length)`.
    """

    seen: Batch
    captions: Batch

    def model(self, seed: int) -> nn.Module:
        from transformers import AutoModel

        torch.manual_seed(seed)
        image, text = resnet20_of_cifar10(self), AutoModel.from_pretrained(minilm(), add_pooling_layer=False)
        width, image.linear = image.linear.in_features, nn.Identity()
        return Pair(image, text, Head(width, text.config.hidden_size))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy over captions, one for every class in the batch, by the template of its first image."""
        classes, labels = batch["labels"].unique(return_inverse=True)
        first = [labels.tolist().index(label) for label in range(len(classes))]
        return F.cross_entropy(model(batch["images"], self.of(classes, batch["templates"][first])), labels)

    def score(self, model: nn.Module, split: Batch) -> float:
        """Zero-shot accuracy: whether the name of its class is nearest to an image, among those in the split."""
        classes, labels = split["labels"].unique(return_inverse=True)
        return recall(self.logits_of(model, split["images"], classes), labels, 1)

    def further(self, model: nn.Module) -> dict[str, float]:
        """Retrieval: whether an image of a class that was trained on finds its caption among those of all classes."""
        logits = self.logits_of(model, self.seen["images"], torch.arange(len(self.captions["input_ids"])))
        return {f"recall at {count}": recall(logits, self.seen["labels"], count) for count in (1, 5)}

    @torch.no_grad()
    def logits_of(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """`(images, classes)`: means over the templates."""
        logits = model.eval()(images, self.of(classes))
        return logits.float().unflatten(1, (len(classes), -1)).mean(-1)

    def of(self, classes: Tensor, templates: Tensor | None = None) -> Batch:
        """The captions of classes, by one template each or by all in turn, padded no further than these need."""
        which = slice(None) if templates is None else templates
        captions = {key: value[classes, which].flatten(0, -2) for key, value in self.captions.items()}
        length = int(captions["attention_mask"].sum(1).max())
        return {key: value[:, :length] for key, value in captions.items()}


def recall(logits: Tensor, labels: Tensor, count: int) -> float:
    """The share of rows whose label is among the `count` largest logits."""
    return (logits.topk(count).indices == labels[:, None]).any(1).float().mean().item()


def captions(data: Path, per_class: int = 25) -> Captions:
    """`per_class` of the 50 training images of a class that is trained on, and all 100 images of the others."""
    from transformers import AutoTokenizer

    cifar, classes = cifar100(data, 50), split_classes()
    train, test = (part["images"].unflatten(0, (100, 50)) for part in (cifar.train, cifar.test))
    both = torch.cat([train, test], 1)

    def split(classes: Tensor, images: Tensor) -> Batch:
        count = images.shape[1]
        return {
            "images": images[classes].flatten(0, 1).contiguous(memory_format=torch.channels_last),
            "labels": classes.repeat_interleave(count),
            "templates": torch.arange(count).repeat(len(classes)) % len(TEMPLATES),
        }

    names = np.load(data / "cifar100" / "cifar100_subset.npz")["class_names"]
    texts = [template.format(name.replace("_", " ")) for name in names for template in TEMPLATES]
    tokens = AutoTokenizer.from_pretrained(minilm())(texts, padding=True, return_tensors="pt")
    return Captions(
        "captions",
        data,
        "head",
        split(classes.train, train[:, :per_class]),
        split(classes.validation, both),
        split(classes.test, both),
        "zero-shot accuracy",
        split(classes.train, test[:, :SEEN_IMAGES]),
        {key: value.unflatten(0, (len(names), len(TEMPLATES))) for key, value in tokens.items()},
    )
