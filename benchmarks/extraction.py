"""Adapters extracted from full fine-tuning, against LoRA's two matrices at the same parameters; and what it costs.

Both sides spend their budget on the same weights by the same solver, so that the structure alone differs. Head, batch
norms and biases are those of the tuned model on both sides, and for the score of the base as well.

    python benchmarks/extraction.py --data ../shared/data           # errors and scores; goes on where it was stopped
    OMP_NUM_THREADS=2 nice -n 10 python benchmarks/extraction.py cost  # time and memory of a ConvNeXt V2 base
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record
import structure
import torch
import updates
from tensorly.decomposition import tucker
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from florapeft import FloraConfig, extract
from florapeft.budget import Choice, spend_on_energy
from florapeft.tucker import mode_energies

SHARES = {"cifar100": structure.SHARES, "cola": (0.05, 0.1, 0.3)}  # of matrices every structure is the same one
TENSORLY_AT = 0.1  # the share at which errors are compared with TensorLy's
ERRORS, COST = record.RESULTS / "extraction.json", record.RESULTS / "extraction_cost.json"


def lora_choices(matrix: Tensor) -> list[Choice]:
    """What every rank of a matrix takes and keeps; no rank at all is a choice too, at the price of one parameter."""
    kept, price = mode_energies(matrix, 0).cumsum(0).tolist(), sum(matrix.shape)
    return [Choice((0,), 1, 0.0)] + [Choice((r,), r * price, energy) for r, energy in enumerate(kept, start=1)]


def lora_fit(found: dict[str, Tensor], budget: int, row_modes: Sequence[int]) -> dict[str, Tensor]:
    """The best matrices of low rank within the budget, in the weights' shapes."""
    matrices, orders = {}, {}
    for name, update in found.items():
        orders[name] = [*row_modes, *(mode for mode in range(update.ndim) if mode not in row_modes)]
        rows = math.prod(update.shape[mode] for mode in row_modes)
        matrices[name] = update.permute(orders[name]).reshape(rows, -1)
    ranks = spend_on_energy({name: lora_choices(matrix) for name, matrix in matrices.items()}, budget)
    fits = {}
    for name, matrix in matrices.items():
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        r = ranks.get(name, (0,))[0]
        shape = [found[name].shape[mode] for mode in orders[name]]
        back = sorted(range(len(shape)), key=orders[name].__getitem__)
        fits[name] = ((left[:, :r] * values[:r]) @ right[:r]).reshape(shape).permute(back)
    return fits


def score(pair: updates.Pair, found: dict[str, Tensor], missing: dict[str, Tensor]) -> float:
    """The score of the tuned model without the part of its update that a fit is missing."""
    model = copy.deepcopy(pair.tuned)
    with torch.no_grad():
        for name in found:
            model.get_parameter(name).sub_(missing[name])
    return pair.task.score(model, pair.task.test)


def tensorly_error(update: Tensor, rank: Sequence[int]) -> float:
    """The relative error of TensorLy's `tucker` at this rank, from its own start and with its own stopping rule."""
    fit = torch.from_numpy(tucker_to_tensor(tucker(update.numpy(), rank, random_state=0)))
    return ((update - fit).norm() / update.norm()).item()


def compare(pair: updates.Pair) -> dict[str, Any]:
    found = structure.targets(pair)
    size = sum(update.numel() for update in found.values())
    rows: dict[str, Any] = {
        "setting": asdict(updates.SETTINGS[pair.task.name]),
        "score_name": pair.task.score_name,
        "weights": len(found),
        "size": size,
        "score_tuned": pair.score,
        "score_without": score(pair, found, found),
        "budgets": [],
    }
    flattenings = {"lora": (0,)} | ({"lora_taps": (0, 2)} if pair.task.name == "cifar100" else {})

    def row(missing: dict[str, Tensor]) -> dict[str, Any]:
        errors = {name: (missing[name].norm() / found[name].norm()).item() for name in found}
        total = math.hypot(*(part.norm().item() for part in missing.values()))
        whole = math.hypot(*(update.norm().item() for update in found.values()))
        return {"error": total / whole, "errors": errors, "score": score(pair, found, missing)}

    for share in SHARES[pair.task.name]:
        began, budget = time.perf_counter(), int(share * size)
        targets = [name.removesuffix(".weight") for name in found]
        model = extract(copy.deepcopy(pair.base), pair.tuned, FloraConfig(budget=budget, target_modules=targets))
        seconds, layers = time.perf_counter() - began, dict(model.get_base_model().named_modules())
        missing = {
            name: update - layers[t].get_delta_weight("default").detach()
            if t in model.peft_config["default"].ranks
            else update
            for (name, update), t in zip(found.items(), targets, strict=True)
        }
        if share == TENSORLY_AT and pair.task.name == "cifar100":
            fits = model.extraction.weights
            rows["above_tensorly"] = {f.name: f.error - tensorly_error(found[f"{f.name}.weight"], f.rank) for f in fits}
        methods = {"flora": row(missing) | {"parameters": model.extraction.parameters, "seconds": seconds}}
        for flattening, row_modes in flattenings.items():
            fits = lora_fit(found, budget, row_modes)
            methods[flattening] = row({name: update - fits[name] for name, update in found.items()})
        rows["budgets"].append({"share": share, "budget": budget, "methods": methods})
        print(pair.task.name, share, {name: (m["error"], m["score"]) for name, m in methods.items()}, flush=True)
    return rows


class Anonymous(threading.Thread):
    """Watches the process' anonymous memory, which leaves out pages that are mapped from files; `peak` in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.peak = self.now()
        self.over = threading.Event()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.peak = max(self.peak, self.now())


def cost() -> dict[str, Any]:
    """A ConvNeXt V2 base (random weights) and a copy with an update of falling spectrum, as sharded folders."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = Path(folder) / "base", Path(folder) / "tuned"
        config = ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], num_labels=1000)
        model = ConvNextV2ForImageClassification(config)
        parameters, largest = sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters())
        model.save_pretrained(base, max_shard_size="100MB")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    matrix = parameter.flatten(1)
                    decay = torch.arange(1, matrix.shape[1] + 1) ** -0.5
                    parameter += 0.01 * (torch.randn_like(matrix) * decay).view_as(parameter)
        model.save_pretrained(tuned, max_shard_size="100MB")
        del model
        watch, stages = Anonymous(), {}
        watch.start()
        began, worked = time.perf_counter(), time.process_time()
        chosen = FloraConfig(budget=0.05, target_modules="all-weights", modules_to_save=["classifier"])

        def progress(stage: str, done: int, count: int) -> None:
            stages.setdefault(stage, []).append(time.perf_counter() - began)

        adapter = extract(base, tuned, chosen, progress=progress)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
        watch.over.set()
        watch.join()
    kept = sum(p.numel() * p.element_size() for p in adapter.parameters() if not p.is_meta)
    return {
        "model": "ConvNeXt V2 base",
        "parameters": parameters,
        "targets": len(adapter.extraction.weights),
        "adapter_parameters": adapter.extraction.parameters,
        "error": adapter.extraction.error,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_by_stage": {stage: times[-1] - times[0] for stage, times in stages.items()},
        "peak_bytes": watch.peak - watch.first,
        "adapter_bytes": kept,
        "largest_weight_bytes": 4 * largest,
        "model_bytes": 4 * parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["errors", "cost"], default="errors")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    if arguments.part == "cost":
        record.write(COST, {"environment": record.environment()} | cost())
        return
    results = record.read(ERRORS)
    for name in updates.SETTINGS:
        if name not in results:
            results[name] = compare(updates.pair(name, arguments.data))
            record.write(ERRORS, results)


if __name__ == "__main__":
    main()
