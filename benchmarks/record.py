"""What every result file says about where it came from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("florapeft", "torch", "peft", "transformers")


@cache
def commit() -> str:
    """The commit that is measured, and whether anything but results has changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}")
    return _git("describe", "--always", "--abbrev=12", "--exclude=*") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()


def environment(*more: str) -> dict[str, Any]:
    """Versions (of `more` packages too), device, and the commit that was measured."""
    return {
        "commit": commit(),
        "versions": {name: version(name) for name in (*PACKAGES, *more)} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as JSON; a killed run leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The record at `path` to go on with, or a new one that says where it comes from."""
    if path.exists():
        return json.loads(path.read_text())
    return {"environment": environment()}
