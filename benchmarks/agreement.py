"""How far do the batches that ranks and start are taken from agree? Per task of benchmarks/accuracy.py.

python benchmarks/agreement.py --data ../shared/data       # writes benchmarks/results/agreement.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import record
import torch
from cases import SETTINGS, available, prepare

from florapeft import allocate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="each draws a head and batches")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    prepare(given.threads)
    results = {"environment": record.environment(), "tasks": {}}
    for case in available(SETTINGS, given.data):
        shares = []
        for seed in range(given.seeds):
            config = case.config(allocation="spectrum")
            shares.append(allocate(case.model(seed), config, case.batches(seed), case.loss).gradient_agreement)
        counts = {"batches": len(case.batches(0)), "batch_size": case.setting.batch_size}
        results["tasks"][case.name] = {"agreement": shares, **counts}
        print(case.name, results["tasks"][case.name], flush=True)
    record.write(record.RESULTS / "agreement.json", results)


if __name__ == "__main__":
    main()
