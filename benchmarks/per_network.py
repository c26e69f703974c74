"""The command line that speed.py and memory.py share: networks one by one, each kept when it is done."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from measure import Clock
from methods import METHODS, Attached, prepare
from networks import NETWORKS, ON_GPU, Network

Rows = dict[str, dict[str, Any]]


def run(
    doc: str,
    name: str,
    examine: Callable[[Network, dict[str, Attached], int, Clock], Rows],
    show: Callable[[str, dict[str, Any]], str],
    given: Sequence[str] | None,
) -> None:
    """Examine the networks that the results lack, and write each into `benchmarks/results/<name>.json`.

    Args:
        doc: of the script.
        name: of its results.
        examine: takes the network, the methods that run on it, the number of repetitions, and a clock.
        show: one printed line for a method's name and row.
        given: the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="three repetitions, and nothing is written")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time: for a busy machine")
    parser.add_argument("--again", action="store_true", help="measure anew what the results have")
    arguments = parser.parse_args(given)
    if len(arguments.methods) < len(METHODS) and not arguments.quick:
        parser.error("a part of the methods is no result: add --quick")
    repetitions = 3 if arguments.quick else arguments.repetitions
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it
    logging.getLogger("florapeft").setLevel(logging.ERROR)  # about running statistics, which we do not save
    names = list(dict.fromkeys(["frozen", "LoRA", *arguments.methods]))
    path = record.RESULTS / (f"{name}_gpu.json" if ON_GPU else f"{name}.json")
    done = _read(path)["networks"]
    for network in arguments.network:
        if network in done and not (arguments.again or arguments.quick):
            continue
        if network == "diffusion" and importlib.util.find_spec("diffusers") is None:
            print("diffusion: not without diffusers")
            continue
        gc.collect()
        prepared = prepare(NETWORKS[network], names, 1 if arguments.quick else 3)
        rows: Rows = {key: dict(value.facts) for key, value in prepared.items()}
        running = {key: value for key, value in prepared.items() if value.model is not None}
        for key, found in examine(NETWORKS[network], running, repetitions, clock).items():
            rows.setdefault(key, {}).update(found)
        for key, row in rows.items():
            print(f"{network:26} {key:20} {row.get('error') or show(key, row)}", flush=True)
        if not arguments.quick:
            environment = record.environment(*_present("diffusers", "lycoris-lora"))
            results = _read(path)  # anew: another process may measure other networks on another core
            results["networks"][network] = {
                "environment": environment,
                "repetitions": repetitions,
                "clock": clock.__name__,
                "shape": NETWORKS[network].shape,
                "rank": NETWORKS[network].rank,
                "methods": rows,
            }
            results["networks"] = {n: results["networks"][n] for n in NETWORKS if n in results["networks"]}
            record.write(path, results)


def _read(path: Path) -> dict[str, Any]:
    results = record.read(path)
    results.pop("environment", None)  # every network has its own
    return {"networks": {}} | results


def _present(*packages: str) -> list[str]:
    from importlib.metadata import packages_distributions

    installed = {name for names in packages_distributions().values() for name in names}
    return [package for package in packages if package in installed]
