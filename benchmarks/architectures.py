"""What "all-weights" does to each architecture of tiny_models.py, and whether it holds: results/architectures.json.

Run it as

    python benchmarks/architectures.py                    # every row, 20 seconds
    python benchmarks/architectures.py ResNet "Wan VAE"   # only print these
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from typing import Any

import peft
import torch
from record import RESULTS, environment, write
from tiny_models import MODELS, UNUSED
from torch import Tensor, nn

from florapeft import FloraConfig
from florapeft.planning import kind_of, left_out
from florapeft.targets import Target, find_targets

RANK = 2
STEPS, RATE = 4, 3e-3
# Of the largest output; the updates move the outputs by a hundred times that at least, or the comparison says nothing.
TOLERANCE = 1e-4


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, frozen and in eval mode, and its batch; the same at every call.

    Weights are drawn with variance 1 / fan-in, biases are not zero, and batch norms have seen the batch: at these
    widths, under many a library's own start (a standard deviation of 0.02, or zero), hardly anything of a layer reaches
    the output. Frozen, because PyTorch may compute a linear layer in another order where its weight is trained.
    """
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for module in model.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is not None and weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif weight is not None:
            nn.init.ones_(weight)
        if bias is not None:
            nn.init.normal_(bias, std=0.1)
    model.eval().requires_grad_(False)
    if norms := batch_norms(model):
        for norm in norms:
            norm.train().momentum = 1.0
        model(**inputs)
    return model.eval(), inputs


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that the model returns."""
    return list(_floating(model(**inputs)))


def _floating(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _floating(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating(item)


def examine(name: str) -> dict[str, Any]:
    """One row of the table.

    Returns:
        The class and its library; adapted modules by kind and order; modules and bare parameters left out, by reason;
        parameters; and for each check what is wrong, or None.
    """
    model, inputs = build(name)
    fresh = copy.deepcopy(model)
    row = {"class": type(model).__name__, "library": type(model).__module__.partition(".")[0]}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        before = outputs(model, inputs)
    config = FloraConfig(r=RANK, target_modules="all-weights")
    row |= describe(model, find_targets(model, config), config)
    adapted = peft.get_peft_model(model, config)
    row["adapter_parameters"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    checks = row["checks"] = {}

    with torch.no_grad():
        checks["identity"] = _differs(outputs(adapted, inputs), before, 0.0)
    unused, row["unused"] = UNUSED.get(name, ("$^", None))
    checks["training"] = train(adapted, inputs, unused)
    with torch.no_grad():
        after = outputs(adapted, inputs)
        least = 100 * TOLERANCE * _size(before)
        if _distance(before, after) < least:
            checks["training"] = checks["training"] or f"the outputs have moved by less than {least:.1g}"
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            reloaded = peft.PeftModel.from_pretrained(fresh, folder)
        checks["reload"] = _differs(outputs(reloaded, inputs), after, 0.0)
        merged = reloaded.merge_and_unload(safe_merge=True)
        left = [key for key, _ in merged.named_parameters() if "flora" in key or "base_layer" in key]
        checks["merge"] = f"{left[0]} is left" if left else _differs(outputs(merged, inputs), after, TOLERANCE)
    return row


def train(model: nn.Module, inputs: dict[str, Any], unused: str) -> str | None:
    """Some steps towards random outputs, with batch norms in eval mode; what is wrong with them, or None.

    Every tensor of the adapter is to move, but for those whose names match `unused`.
    """
    model.train()
    for norm in batch_norms(model):
        norm.eval()
    adapters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    started = {key: p.detach().clone() for key, p in adapters.items()}
    targets = [torch.randn_like(output) for output in outputs(model, inputs)]

    def loss() -> Tensor:
        return sum((out - target).square().mean() for out, target in zip(outputs(model, inputs), targets, strict=True))

    optimizer = torch.optim.Adam(adapters.values(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    model.eval()
    still = [key for key, p in adapters.items() if torch.equal(p, started[key])]
    if wrong := [key for key in still if not re.search(unused, key)]:
        return f"{len(wrong)} of {len(adapters)} adapter tensors have not moved, as {wrong[0]}"
    with torch.no_grad():
        losses.append(loss().item())
    # At one of the steps: in a random network of dozens of layers the next may be too long.
    least = min(losses[1:])
    return None if least < losses[0] else f"the loss went from {losses[0]:.4g} to {least:.4g} at best"


def describe(model: nn.Module, targets: list[Target], config: FloraConfig) -> dict[str, Any]:
    """How many weights of each kind and order are adapted, and how many are left out, by reason."""
    modules = dict(model.named_modules())
    kinds = Counter((len(target.shape), kind_of(modules[target.module])) for target in targets)
    left: dict[str, list[str]] = {}
    for name, reason in left_out(model, targets, config).items():
        left.setdefault(reason, []).append(name)
    return {
        "adapted": [{"order": order, "kind": kind, "count": kinds[order, kind]} for order, kind in sorted(kinds)],
        "left_out": [{"reason": reason, "count": len(names), "example": names[0]} for reason, names in left.items()],
    }


def problems(row: dict[str, Any]) -> dict[str, str]:
    """The checks that a row does not pass, and what is wrong."""
    return {check: problem for check, problem in row["checks"].items() if problem}


def _size(tensors: list[Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def _differs(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    """How far apart the outputs are, if by more than `tolerance` of their size."""
    apart = _distance(found, expected)
    return None if apart <= tolerance * _size(expected) else f"outputs differ by {apart:.2g} of {_size(expected):.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="print these rows and write nothing")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # batch norms, capped ranks; kernels that are not installed
    rows = {}
    for name in names or MODELS:
        rows[name] = examine(name)
        print(name, json.dumps(rows[name], indent=1) if names else problems(rows[name]) or "holds", flush=True)
    if not names:
        write(
            RESULTS / "architectures.json",
            {"environment": environment("diffusers", "monai"), "rank": RANK, "rows": rows},
        )
    return int(any(problems(row) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
