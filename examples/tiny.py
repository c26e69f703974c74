"""Writes tiny models and data sets to try the three job files of this folder without a network connection.

    python examples/tiny.py tiny
    flora train examples/image-classification.yaml model=tiny/image/model data.path=tiny/image/data \\
        data.columns.label=label
    flora train examples/text-classification.yaml model=tiny/text/model \\
        data.path='{train: tiny/text/train.csv, validation: tiny/text/validation.csv}'
    flora train examples/causal-lm.yaml model=tiny/causal/model data.path=tiny/causal/train.jsonl data.holdout=0.25

The models are random, so nothing good comes out of them; the tests run exactly these lines.
"""

import csv
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["good", "bad", "a", "the", "film", "was", "very", "not", "quite", "story", "dull", "bright"]


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of whole words, written for transformers; returns the size of its vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    return len(vocabulary)


def write_image(folder: Path, per_class: int = 6) -> None:
    """A random ConvNeXt of two stages, and PNG images of two colours in one folder per class."""
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], image_size=16, num_labels=3)
    transformers.ConvNextForImageClassification(config).save_pretrained(folder / "model")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    generator = np.random.default_rng(0)
    for split, count in (("train", per_class), ("validation", per_class // 2)):
        for channel, label in enumerate(("red", "green")):
            place = folder / "data" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 80, size=(20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(place / f"{number}.png")


def write_text(folder: Path, count: int = 24) -> None:
    """A random BERT of one layer and sentences that hold the word of their label."""
    folder.mkdir(parents=True)
    size = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    chooser = random.Random(0)
    for split, rows in (("train", count), ("validation", count // 2)):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            for row in range(rows):
                label = ("good", "bad")[row % 2]
                writer.writerow([" ".join(["the", *chooser.choices(WORDS[3:], k=3), label]), label])


def write_causal(folder: Path, count: int = 16) -> None:
    """A random GPT-2 of one layer, whose linear layers are transformers' Conv1D, and lines of words."""
    folder.mkdir(parents=True)
    size = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    chooser = random.Random(0)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(chooser.choices(WORDS, k=6))}) + "\n")


def main(folder: Path) -> None:
    write_image(folder / "image")
    write_text(folder / "text")
    write_causal(folder / "causal")
    print(f"written to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny"))
