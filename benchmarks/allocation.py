"""Which rule should spend a budget? Rules compared at equal parameters, from the same start, on a convolutional task.

ResNet-20, pretrained on CIFAR-10, is adapted to CIFAR-100 with 20 images per class. A new head is trained alone first,
on the frozen network's features, which is the same for every rule; then head and adapter together, batch norms in eval
mode. All rules start from the gradients of the same batches (`init_weights="gradient"`) and train at the same rate.

    nice python benchmarks/allocation.py --data ../shared/data     # writes benchmarks/results/allocation.json (resumes)
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import record
import tasks
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import florapeft
from florapeft.rank import cap_rank, count_parameters, resolve_rank

SEEDS = (0, 1, 2)
SHARE = 0.1  # of the network, as adapter parameters
SETTING = {"images_per_class": 20, "epochs": 4, "batch": 64, "rate": 1e-2, "head_rate": 1e-2, "gradient_batches": 8}
TARGETS = r".*\.conv[12]"
RULES = ("common rank", "uniform", "spectrum")


def configure(rule: str, model: nn.Module, batches: list[tasks.Batch], task: tasks.Task) -> florapeft.FloraConfig:
    """The configuration that spends the budget by this rule."""
    shared = {"init_weights": "gradient", "target_modules": TARGETS, "modules_to_save": [task.head]}
    count = sum(parameter.numel() for parameter in model.parameters())
    if rule == "common rank":  # the largest r for all channel modes, with kernels whole
        shapes = [m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "layer" in n]

        def total(r: int) -> int:
            ranks = [(shape, cap_rank(resolve_rank(shape, r, None, (0, 1), ""), shape)) for shape in shapes]
            return sum(count_parameters(shape, rank) for shape, rank in ranks)

        return florapeft.FloraConfig(r=max(r for r in range(1, 64) if total(r) <= SHARE * count), **shared)
    config = florapeft.FloraConfig(budget=SHARE, **shared)
    return config if rule == "uniform" else florapeft.allocate(model, config, batches, task.loss)


def warm_head(task: tasks.Task, model: nn.Module, train: tasks.Batch) -> None:
    """Train the head alone on the features of the frozen network."""
    features: list[Tensor] = []
    handle = model.linear.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    with torch.no_grad():
        for batch in tasks.batches(train, 250):
            model.eval()(batch["images"])
    handle.remove()
    x, optimizer = torch.cat(features), torch.optim.AdamW(model.linear.parameters(), lr=SETTING["head_rate"])
    for _ in range(20):
        for chosen in torch.randperm(len(x)).split(SETTING["batch"]):
            optimizer.zero_grad()
            F.cross_entropy(model.linear(x[chosen]), train["labels"][chosen]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)


def train(task: tasks.Task, rule: str, seed: int) -> dict[str, Any]:
    """One run: its accuracy on the test split, what it trained, and the ranks."""
    data = {key: value.view(100, -1, *value.shape[1:]) for key, value in task.train.items()}
    data = {key: value[:, : SETTING["images_per_class"]].flatten(0, 1) for key, value in data.items()}
    model = task.model(seed)
    warm_head(task, model, data)
    head_only = task.score(model, task.test)
    began = time.process_time()
    order = torch.randperm(len(data["labels"]))
    batches = tasks.batches(data, SETTING["batch"], order)[: SETTING["gradient_batches"]]
    config = configure(rule, model, batches, task)
    model = get_peft_model(model, config)
    if rule != "spectrum":
        florapeft.initialize_from_gradients(model, batches, task.loss)
    passed = time.process_time() - began
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".flora_" in name].append(parameter)
    rates = {True: SETTING["rate"], False: SETTING["head_rate"] / 10}
    optimizer = torch.optim.AdamW([{"params": groups[key], "lr": rates[key]} for key in groups], weight_decay=0.0)
    steps = SETTING["epochs"] * len(tasks.batches(data, SETTING["batch"]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.eval()
    for _ in range(SETTING["epochs"]):
        for batch in tasks.batches(data, SETTING["batch"], torch.randperm(len(data["labels"]))):
            optimizer.zero_grad()
            task.loss(model, task.augment(batch)).backward()
            optimizer.step()
            schedule.step()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, florapeft.FloraLayer)}
    return {
        "rule": rule,
        "seed": seed,
        "test": task.score(model, task.test),
        "head_only": head_only,
        "adapter_parameters": sum(parameter.numel() for parameter in groups[True]),
        "ranks": {name: list(layer.tucker("default").rank) for name, layer in layers.items()},
        "pass_seconds": round(passed, 1),
        "seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    arguments = parser.parse_args()
    task, path = tasks.TASKS["cifar100"](arguments.data), record.RESULTS / "allocation.json"
    for seed in arguments.seeds:
        for rule in RULES:
            if any((run["rule"], run["seed"]) == (rule, seed) for run in record.read(path).get("runs", [])):
                continue
            run = train(task, rule, seed)
            print({key: value for key, value in run.items() if key != "ranks"}, flush=True)
            results = record.read(path)  # anew: another process may run other seeds on another core
            results |= {"setting": SETTING, "budget": SHARE}
            results.setdefault("runs", []).append(run)
            record.write(path, results)
    results = record.read(path)
    runs = results.get("runs", [])
    if len(runs) < len(RULES) * len(SEEDS):
        return
    results["summary"] = {}
    for rule in RULES:
        scores = [run["test"] for run in runs if run["rule"] == rule]
        parameters = [run["adapter_parameters"] for run in runs if run["rule"] == rule]
        results["summary"][rule] = {
            "test_mean": statistics.mean(scores),
            "test_std": statistics.stdev(scores),
            "adapter_parameters": statistics.mean(parameters),
        }
    record.write(path, results)


if __name__ == "__main__":
    main()
