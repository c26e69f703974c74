"""What one order-3 update of a stack of experts saves against PEFT's LoRA, which has r rows per expert.

One transformers block of experts, every way of computing them: training steps, what they keep for the backward pass,
and the most memory they take. FLoRA's route "dense" builds the stack W + dW, as LoRA does.

    python benchmarks/experts.py             # writes benchmarks/results/experts.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import record
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from florapeft import FloraConfig

HIDDEN, INTERMEDIATE, EXPERTS, CHOSEN, TOKENS = 256, 128, 32, 4, 128
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


class Block(nn.Module):
    """Router and experts of Qwen3-MoE."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=CHOSEN)
        config._experts_implementation = implementation
        self.moe = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.moe(x)
        return out[0] if isinstance(out, tuple) else out


def methods(implementation: str) -> dict[str, nn.Module]:
    """The same block with every adapter; ranks as their users choose them, and one at LoRA's number of parameters."""

    def flora(r: int | list[int], route: str = "auto") -> nn.Module:
        ranks = {"target_modules": [], "target_parameters": STACKS, "r": r}
        model = get_peft_model(Block(implementation), FloraConfig(**ranks))
        model.base_model.set_route(route)
        return model

    def lora(r: int) -> nn.Module:
        given = {"target_modules": [], "target_parameters": STACKS, "r": r, "lora_alpha": r}
        return get_peft_model(Block(implementation), LoraConfig(**given))

    return {
        "frozen": Block(implementation).requires_grad_(False),
        "FLoRA r=8": flora(8),
        "FLoRA r=8, dense": flora(8, "dense"),
        "FLoRA at LoRA's parameters": flora([EXPERTS, 53, 53]),
        "LoRA r=8": lora(8),
    }


def run(implementation: str, repetitions: int) -> dict[str, dict[str, object]]:
    """All methods with one way of computing the experts."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, HIDDEN)

    def loss(model: nn.Module) -> torch.Tensor:
        return model(x.requires_grad_()).square().mean()

    models = methods(implementation)
    steps: dict[str, Callable[[], None]] = {name: measure.step_of(model, loss) for name, model in models.items()}
    times = measure.side_by_side(steps, "frozen", repetitions)
    rows = {}
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        memory = {"saved": measure.saved_bytes(model, loss), "peak": measure.peak_bytes(steps[name])}
        rows[name] = {"parameters": parameters, **times[name], **memory}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11)
    arguments = parser.parse_args()
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS, "chosen": CHOSEN, "tokens": TOKENS}
    results = {"environment": record.environment(), "sizes": sizes, "implementations": {}}
    for implementation in IMPLEMENTATIONS:
        rows = results["implementations"][implementation] = run(implementation, arguments.repetitions)
        for name, row in rows.items():
            print(
                f"{implementation:11} {name:28} {row['parameters']:>9,} parameters  x{row['ratio']:.2f}  "
                f"saved {row['saved'] / 1e6:6.1f} MB  peak {row['peak'] / 1e6:6.1f} MB"
            )
    record.write(record.RESULTS / "experts.json", results)


if __name__ == "__main__":
    main()
