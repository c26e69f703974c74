"""benchmarks/captions.py: classes are kept apart, captions go to the right images, and what is measured is that."""

import accuracy
import captions
import pytest
import tasks
import torch
import torch.nn.functional as F
from cases import SETTINGS, Case, fit
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from florapeft import FloraLayer

CLASSES, TEMPLATES, LENGTH = 6, 4, 5


class Images(nn.Module):
    """A convolution, averaged over the image."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)

    def forward(self, x):
        return self.conv1(x).relu().mean((2, 3))


class Small(captions.Captions):
    """The task with small random encoders."""

    def model(self, seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
        text = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
        return captions.Pair(Images(), text, captions.Head(12, 16))


@pytest.fixture
def task():
    torch.manual_seed(0)
    length = torch.arange(CLASSES)[:, None, None] % 3 + 2  # 2 to 4 of 5 tokens: no class needs all
    mask = (torch.arange(LENGTH) < length).long().expand(CLASSES, TEMPLATES, LENGTH)
    tokens = torch.randint(1, 50, (CLASSES, TEMPLATES, LENGTH)) * mask

    def split(classes, count):
        labels = torch.tensor(classes).repeat_interleave(count)
        images = torch.randn(CLASSES, 3, 1, 1)[labels] + 0.1 * torch.randn(len(labels), 3, 6, 6)
        templates = torch.arange(len(labels)) % TEMPLATES
        return {"images": images, "labels": labels, "templates": templates}

    both = {"input_ids": tokens, "attention_mask": mask}
    parts = split([0, 2, 3], 6), split([1], 4), split([4, 5], 4)
    return Small("captions", None, "head", *parts, "zero-shot accuracy", split([0, 2, 3], 2), both)


@pytest.fixture
def case(task, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "captions", lambda data, **sizes: task)
    return Case("captions", SETTINGS["captions"], None).at(0.1)


def test_classes_are_disjoint_complete_and_always_the_same():
    classes = captions.split_classes()
    assert [len(part) for part in classes] == [60, 20, 20]
    assert torch.cat(classes).sort().values.tolist() == list(range(100))
    torch.manual_seed(1)
    assert all(map(torch.equal, classes, captions.split_classes()))


def test_captions_of_classes_are_no_longer_than_need_be(task):
    tokens = task.captions["input_ids"]
    classes = torch.tensor([3, 1])  # of 2 and 3 tokens
    assert torch.equal(task.of(classes)["input_ids"], tokens[classes].flatten(0, 1)[:, :3])
    one_each = task.of(classes, torch.tensor([2, 0]))
    assert torch.equal(one_each["input_ids"], torch.stack([tokens[3, 2], tokens[1, 0]])[:, :3])
    assert one_each["attention_mask"].sum(1).tolist() == [2, 3]


def test_logits_are_scaled_cosines_whatever_the_padding(task):
    model = task.model(0).eval()
    images, classes = task.test["images"], torch.tensor([4, 0])
    logits = model(images, task.of(classes))
    assert logits.shape == (len(images), 2 * TEMPLATES)
    assert logits.abs().max() <= model.head.log_scale.exp() * (1 + 1e-5)
    alone = [model(images, task.of(classes[i : i + 1])) for i in range(2)]
    torch.testing.assert_close(logits, torch.cat(alone, 1))


def test_loss_has_one_caption_per_class_of_the_batch(task):
    model = task.model(0).eval()
    batch = {key: value[[7, 0, 6, 13]] for key, value in task.train.items()}  # classes 2, 0, 2, 3
    assert batch["labels"].tolist() == [2, 0, 2, 3]
    templates = batch["templates"][[1, 0, 3]]  # those of the first images of classes 0, 2, 3
    logits = model(batch["images"], task.of(torch.tensor([0, 2, 3]), templates))
    torch.testing.assert_close(task.loss(model, batch), F.cross_entropy(logits, torch.tensor([1, 0, 1, 2])))


def test_recall():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 0, 2])
    assert [captions.recall(logits, labels, count) for count in (1, 2, 3)] == [0.5, 0.75, 1.0]


def test_zero_shot_is_among_the_classes_of_the_split_and_retrieval_among_all(task, monkeypatch):
    asked = []

    def logits_of(self, model, images, classes):
        asked.append(classes.tolist())
        return -(classes - 4.0).abs().repeat(len(images), 1)  # always nearest to class 4

    monkeypatch.setattr(captions.Captions, "logits_of", logits_of)
    assert task.score(None, task.test) == 0.5
    assert task.further(None) == {"recall at 1": 0.0, "recall at 5": pytest.approx(2 / 3)}  # all but class 0
    assert asked == [[4, 5], list(range(CLASSES))]


def test_both_encoders_are_adapted_by_one_config(case):
    model = get_peft_model(case.task.model(0), case.config())
    adapted = {name: m.get_base_layer().weight.ndim for name, m in model.named_modules() if isinstance(m, FloraLayer)}
    assert set(adapted.values()) == {2, 4}
    assert len(adapted) == 1 + 2 * 6  # the convolution, and all that multiplies in the last two layers of the text's


@pytest.mark.parametrize("method", ["LoRA", "LoRA, gradient start", "FLoRA", accuracy.RECIPE])
def test_a_method_trains_both(case, method):
    run = accuracy.train(case, method, accuracy.Rates(1e-2, 1e-2), 0)
    assert 0 <= run["test"] <= 1
    assert set(run["further"]) == {"recall at 1", "recall at 5"}
    assert abs(run["parameters"] / case.goal - 1) < 0.05


def test_the_pair_learns(case):
    model = case.model(0)
    before = case.task.loss(model.eval(), case.task.train)
    model, _ = accuracy.METHODS["full fine-tuning"](case, model, 0)
    fit(case, model, [(3e-3, list(model.parameters()))], 20, 0)
    assert case.task.loss(model.eval(), case.task.train) < 0.5 * before
