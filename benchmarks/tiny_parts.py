"""What the tiny models have in common: sizes that most configurations name alike, and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]  # a model, and the keyword arguments of its forward

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "use_cache": False}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(length: int = 12, batch: int = 2) -> Tensor:
    """Token ids that occur in every configuration here; 0 to 3 are left to special tokens."""
    return torch.randint(4, 64, (batch, length))
