"""Attaching to and loading onto a model of seven billion parameters that is not in memory.

The weights lie in a sparse file that is mapped into memory: a weight that is read, copied or changed would show in the
resident memory. Also on the meta device, where there is nothing to read. LoRA at the same r beside it.

    python benchmarks/large.py        # writes benchmarks/results/large.json
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peft
import record
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

from florapeft import FloraConfig

REPETITIONS = 5
CONFIGS = {
    "FLoRA, r": lambda: FloraConfig(r=16, target_modules="all-linear"),
    "FLoRA, budget": lambda: FloraConfig(budget=0.005, target_modules="all-linear"),
    "LoRA": lambda: peft.LoraConfig(r=16, target_modules="all-linear"),
}


def llama() -> nn.Module:
    """Shaped like Llama 2 7B, on the meta device."""
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig()).to(torch.float16).requires_grad_(False)


def mapped(file: Path) -> nn.Module:
    """The same with its weights in `file`, which takes no place on the disk."""
    model = llama()
    count = sum(parameter.numel() for parameter in model.parameters())
    with file.open("wb") as handle:
        handle.truncate(2 * count)
    storage, start = torch.from_file(str(file), shared=False, size=count, dtype=torch.float16), 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = storage[start : start + parameter.numel()].view(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
            start += parameter.numel()
    return model


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def attach(config: Any, model: nn.Module) -> tuple[nn.Module, float]:
    began = time.perf_counter()
    return peft.get_peft_model(model, config), time.perf_counter() - began


def on_meta(name: str) -> dict[str, Any]:
    """Seconds of attaching where nothing has values, and whether all stays so."""
    attached = [attach(CONFIGS[name](), llama()) for _ in range(REPETITIONS)]
    return {
        "parameters": sum(p.numel() for p in attached[0][0].parameters() if p.requires_grad),
        "meta_seconds": statistics.median(seconds for _, seconds in attached),
        "meta_only": all(p.is_meta for p in attached[0][0].parameters()),
    }


def attached(name: str, folder: Path) -> dict[str, Any]:
    """Seconds and resident bytes of attaching; saves the adapter."""
    model = mapped(folder / "weights")
    before = resident()
    model, seconds = attach(CONFIGS[name](), model)
    row = {"attach_seconds": seconds, "attach_bytes": resident() - before}
    tensors = peft.get_peft_model_state_dict(model)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)
    return row | {"adapter_bytes": sum(tensor.nbytes for tensor in tensors.values())}


def loaded(name: str, folder: Path) -> dict[str, Any]:
    """Seconds and resident bytes of loading what was saved."""
    base = mapped(folder / "weights")
    before, began = resident(), time.perf_counter()
    model = peft.PeftModel.from_pretrained(base, folder)
    row = {"load_seconds": time.perf_counter() - began, "load_bytes": resident() - before}
    if not any("flora_" in key or "lora_" in key for key, _ in model.named_parameters()):
        raise RuntimeError(f"{name}: nothing was loaded")
    return row


def alone(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The function's result in a process of its own, whose memory nobody has used before."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_quiet) as pool:
        return pool.submit(function, *given).result()


def _quiet() -> None:
    logging.getLogger("florapeft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks transformers for it


def main() -> None:
    rows = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = alone(on_meta, name) | alone(attached, name, Path(folder)) | alone(loaded, name, Path(folder))
        print(name, rows[name], flush=True)
    count = sum(parameter.numel() for parameter in llama().parameters())
    results = {"parameters": count, "weight_bytes": 2 * count, "methods": rows, "environment": record.environment()}
    record.write(record.RESULTS / "large.json", results)


if __name__ == "__main__":
    main()
