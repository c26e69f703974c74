"""A stack of experts from one text domain to another: Python's code to Python's prose, byte by byte.

The network is a small Mixtral, trained here on the code of the standard library, without its comments and docstrings.
It is adapted to the language reference that `help()` shows. Both come with Python: the texts are those of the version
that runs this.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from pathlib import Path

import pretrained
import torch
from tasks import Batch, Task, warm_cosine
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

LENGTH = 128  # bytes that the network sees at most
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 8}
STEPS, BATCH_SIZE, RATE = 800, 32, 3e-3  # of the training on code
BALANCE = 0.01  # weight of the loss that spreads bytes over experts, in that training
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class NextByte(Task):
    """Predict every byte of a passage from those before it."""

    def model(self, seed: int) -> nn.Module:
        """The pretrained network; it has no new head, and so nothing depends on `seed`."""
        made_by = [inspect.getsource(part) for part in (network, pretrain, code, bare)]
        settings = [SIZES, LENGTH, STEPS, BATCH_SIZE, RATE, BALANCE, sys.version, torch.__version__]
        return pretrained.load(network, pretrain, "experts", made_by + settings)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Shape `(passages, 256, bytes)`."""
        return model(input_ids=batch["input_ids"], use_cache=False).logits.transpose(1, 2)


def experts(data: Path) -> NextByte:
    """Passages of the language reference; needs no `data`."""
    parts = {}
    for part, texts in reference().items():
        passages = torch.cat([in_passages(text) for text in texts])
        parts[part] = {"input_ids": passages[:, :-1], "labels": passages[:, 1:]}
    return NextByte("experts", data, None, parts["train"], parts["validation"], parts["test"], "accuracy")


def reference() -> dict[str, list[str]]:
    """Topics of the language reference by split; no paragraph is in two of them.

    A paragraph that several topics quote is left to the longest of them. The topics, longest first, go to the split
    that is furthest behind its share.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    splits: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(text.split()): text for text in topics[name].split("\n\n")}
        text = "\n\n".join(text for words, text in paragraphs.items() if words not in seen)
        seen.update(paragraphs)
        if len(text) > LENGTH:
            split = min(SHARES, key=lambda split: sum(map(len, splits[split])) / SHARES[split])
            splits[split].append(text)
    return splits


def code() -> str:
    """The public modules of the standard library that are one file each, without comments and docstrings."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return "\n".join(bare(path.read_bytes()) for path in paths)


def bare(source: bytes) -> str:
    """Python source without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def in_passages(text: str) -> Tensor:
    """All whole passages of `LENGTH` bytes, each with the byte after it; shape `(passages, LENGTH + 1)`."""
    found = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return found.unfold(0, LENGTH + 1, LENGTH)


def network() -> MixtralForCausalLM:
    """Attention and experts; what reads and what writes bytes is one embedding."""
    config = MixtralConfig(
        **SIZES,
        vocab_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        router_aux_loss_coef=BALANCE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._experts_implementation = "eager"  # of transformers' three ways the fastest for so few experts on a CPU
    return MixtralForCausalLM(config)


def pretrain(model: nn.Module) -> None:
    """Train on passages that begin anywhere in the code."""
    found = torch.frombuffer(bytearray(code().encode()), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, STEPS))
    for _ in range(STEPS):
        starts = torch.randint(len(found) - LENGTH, (BATCH_SIZE, 1))
        passages = found[starts + torch.arange(LENGTH)].long()
        loss = model(input_ids=passages, labels=passages, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
