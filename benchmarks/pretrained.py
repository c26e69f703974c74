"""Networks that a benchmark pretrains by itself: made on their first use, and kept where git does not look."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

CACHE = Path(__file__).parent / ".cache"
skipped = False  # whether networks stay as they are built, for tests of what is done with them


def load(build: Callable[[], nn.Module], pretrain: Callable[[nn.Module], None], name: str, recipe: object) -> nn.Module:
    """A pretrained network: from its file if there is one for this recipe, or else trained now and kept.

    Torch's generator is left as it was.

    Args:
        build: makes the network, with weights that torch's generator, at seed 0, decides.
        pretrain: trains it in place.
        name: the file's, before a hash of the recipe.
        recipe: all that the weights depend on; its `repr` counts.
    """
    path = CACHE / f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        if skipped:
            return model
        if path.is_file():
            load_model(model, path)
            return model
        print(f"pretraining {name}, once", flush=True)
        pretrain(model)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")  # another process may be about to write the same file
    save_model(model, str(part))
    part.replace(path)
    return model
