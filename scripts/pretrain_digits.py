"""Pretrains the network of the built-in job and writes it into the package; about ten seconds on one core.

    python scripts/pretrain_digits.py            # rewrites florapeft/train/builtin/; the same bytes each time
    python scripts/pretrain_digits.py --choose   # rates and ranks of BUILTIN_SETTINGS on the validation split, minutes

The first also writes benchmarks/results/builtin_pretraining.json, the second benchmarks/results/builtin_settings.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this disk

import torch
import transformers
from transformers import AutoModelForImageClassification, ConvNextV2Config
from transformers.utils import logging

from florapeft.train import comparison
from florapeft.train.digits import BUILTIN_SETTINGS, SPLITS, DigitsTask, builtin_model_path, load_digits_task
from florapeft.train.record import versions

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
COMMAND = "python scripts/pretrain_digits.py"
SEED = 0
NETWORK = {
    "num_channels": 1,
    "image_size": [8, 24],
    "patch_size": 2,
    "num_stages": 3,
    "hidden_sizes": [32, 64, 96],
    "depths": [1, 1, 1],
    "initializer_range": 0.1,  # the usual 0.02 is for widths of hundreds
}
PRETRAINING = {"epochs": 40, "batch_size": 32, "learning_rate": 3e-3, "warmup": 0.1, "weight_decay": 0.0}

CHOICE_SEEDS = (10, 11, 12)  # not those of the built-in job
CHOICES: dict[str, list[dict[str, Any]]] = {
    "head": [{"learning_rate": rate} for rate in (2e-2, 5e-2, 1e-1, 2e-1)],
    "full": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)],
    "flora": [{"learning_rate": rate, "r": 4} for rate in (5e-3, 1e-2, 2e-2, 3e-2, 5e-2)]
    + [{"learning_rate": 2e-2, "r": r} for r in (2, 6)],
}


def batches(data: dict[str, torch.Tensor], size: int, epochs: int) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches of every epoch, the last one of an epoch may be smaller."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(data["labels"])).split(size):
            yield {name: values[chosen] for name, values in data.items()}


def pretrain(task: DigitsTask) -> transformers.PreTrainedModel:
    """A network trained on `task` from nothing: AdamW, linear warm-up, then a cosine down to zero."""
    torch.manual_seed(SEED)
    labels = dict(enumerate(task.labels))
    config = ConvNextV2Config(**NETWORK, id2label=labels, label2id={label: index for index, label in labels.items()})
    model = AutoModelForImageClassification.from_config(config)
    steps = PRETRAINING["epochs"] * math.ceil(len(task.train["labels"]) / PRETRAINING["batch_size"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PRETRAINING["learning_rate"], weight_decay=PRETRAINING["weight_decay"]
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(PRETRAINING["warmup"] * steps), steps)
    model.train()
    for batch in batches(task.train, PRETRAINING["batch_size"], PRETRAINING["epochs"]):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model


def write_network() -> None:
    """Pretrains, saves network and card, and prints the accuracies."""
    torch.set_num_threads(1)  # sums in another order would give other weights
    task = load_digits_task("pretraining")
    model = pretrain(task)
    card = {
        "task": "scikit-learn's handwritten digits 0 to 4, single, white on black; half of their images",
        "command": COMMAND,
        "seed": SEED,
        "network": {"architecture": type(model).__name__, **NETWORK},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": PRETRAINING,
        "examples": {split: len(getattr(task, split)["labels"]) for split in SPLITS},
        "accuracy": {split: comparison.accuracy(model, getattr(task, split)) for split in SPLITS},
        "versions": versions(),
    }
    folder = builtin_model_path()
    model.save_pretrained(folder)
    for path in (folder / "card.json", RESULTS / "builtin_pretraining.json"):
        path.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    for split, share in card["accuracy"].items():
        print(f"{split}: {100 * share:.1f}% of {card['examples'][split]}")
    size = (folder / "model.safetensors").stat().st_size
    print(f"{card['parameters']:,} parameters, {size:,} bytes in {folder}")


def validation_accuracy(method: str, seed: int, task: DigitsTask, choice: dict[str, Any]) -> float:
    """Of one run of the built-in job with other settings."""
    fields = {**BUILTIN_SETTINGS["train"], "learning_rate": choice["learning_rate"]}
    adapter = {**BUILTIN_SETTINGS["adapter"], **{key: choice[key] for key in choice if key != "learning_rate"}}
    transformers.set_seed(seed)
    model = comparison.attach(method, comparison.load_network(str(builtin_model_path()), task.labels), adapter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=True,
            seed=seed,
            **fields,
        )
        rows = comparison._Rows(task.train)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return comparison.accuracy(model, task.validation)


def choose() -> None:
    """Measures every choice on the validation split; the test split is not looked at."""
    torch.set_num_threads(1)
    task = load_digits_task("target")
    record: dict[str, Any] = {"command": f"{COMMAND} --choose", "split": "validation", "seeds": CHOICE_SEEDS}
    record["train"] = {key: value for key, value in BUILTIN_SETTINGS["train"].items() if key != "learning_rate"}
    record |= {"versions": versions(), "methods": {method: [] for method in CHOICES}}
    for method, choices in CHOICES.items():
        for choice in choices:
            found = [validation_accuracy(method, seed, task, choice) for seed in CHOICE_SEEDS]
            mean, deviation = statistics.mean(found), statistics.stdev(found)
            record["methods"][method].append({**choice, "mean": mean, "std": deviation, "accuracies": found})
            print(f"{method} {choice}: {100 * mean:.1f} ± {100 * deviation:.1f}", flush=True)
    (RESULTS / "builtin_settings.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="measure rates and ranks on the validation split")
    logging.set_verbosity_error()  # a new head is no surprise here
    logging.disable_progress_bar()
    if parser.parse_args().choose:
        choose()
    else:
        write_network()
