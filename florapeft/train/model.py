"""The network of a job: base model, its head, what turns examples into inputs, and the adapter attached."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from florapeft import FloraConfig
from florapeft.targets import task_heads
from florapeft.train.data import LABEL_ID
from florapeft.train.job import Job

_AUTO_CLASS = {
    "image-classification": transformers.AutoModelForImageClassification,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}
_TASK_TYPE = {"image-classification": None, "text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
_SAVED_BY_PEFT = {"text-classification": SEQ_CLS_HEAD_NAMES}  # with every adapter of the task's type
IGNORED = -100  # a label that transformers' losses leave out


def load_base(task: str, model: str, labels: list[str] | None) -> transformers.PreTrainedModel:
    """The base model from a hub id or a local folder, safetensors only, with a head for `labels`.

    A head of another size than the checkpoint's starts anew, at random, and so does what the checkpoint lacks, such as
    a pooler; set the seed before.

    Raises:
        ValueError, OSError: not found, no safetensors, or not a model for `task`; one line that names it.
    """
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise FileNotFoundError(f"model folder not found: {model}")
    arguments: dict[str, Any] = {}
    if labels is not None:
        arguments["id2label"] = dict(enumerate(labels))
        arguments["label2id"] = {label: index for index, label in enumerate(labels)}
        arguments["ignore_mismatched_sizes"] = True
    try:
        return load_pretrained(_AUTO_CLASS[task], str(Path(model).expanduser()), **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model '{model}' for {task}: {' '.join(str(error).split())}") from error


def load_pretrained(cls: Any, model: str, **arguments: Any) -> transformers.PreTrainedModel:
    """A model of transformers, safetensors only, that knows which of its modules the checkpoint had no weights for."""
    base, found = cls.from_pretrained(model, use_safetensors=True, output_loading_info=True, **arguments)
    new = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if loose := sorted(key for key in new if "." not in key):
        raise ValueError(
            f"the checkpoint lacks {', '.join(loose)}, and an adapter saves modules, not single parameters"
        )
    base.new_modules = sorted({key.rpartition(".")[0] for key in new})
    return base


def check_is_whole(model: peft.PeftModel) -> None:
    """Raises ValueError if weights are at random that neither the base's checkpoint nor the adapter has."""
    base = model.get_base_model()
    saved = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    random = [name for name in base.new_modules if not any(f"{name}.".startswith(f"{module}.") for module in saved)]
    if random:
        raise ValueError(
            f"neither the checkpoint of '{base.name_or_path}' nor the adapter has weights for {', '.join(random)}; "
            "is it the base that the adapter was trained on?"
        )


def load_skeleton(model: str) -> transformers.PreTrainedModel:
    """A model of the class and sizes that a hub id's or a local folder's config says, on the meta device: no weights.

    Raises:
        ValueError, OSError: not found, or not a config of transformers; one line that names it.
    """
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise FileNotFoundError(f"model folder not found: {model}")
    try:
        config = transformers.AutoConfig.from_pretrained(str(Path(model).expanduser()))
        known = [getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)]
        with torch.device("meta"):
            skeleton = known[0](config) if known else transformers.AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the config of model '{model}': {' '.join(str(error).split())}") from error
    return skeleton.to(getattr(config, "dtype", None) or torch.float32)


def attach(job: Job, base: transformers.PreTrainedModel, **changes: Any) -> peft.PeftModel:
    """Attaches FLoRA with the job's `adapter` fields; a classifier's head is trained in full and saved along."""
    return peft.get_peft_model(base, adapter_config(job, base, **changes))


def adapter_config(job: Job, base: transformers.PreTrainedModel, **changes: Any) -> FloraConfig:
    """The job's `adapter` fields, with what follows from its task, and with `changes`."""
    return FloraConfig(**{"target_modules": "all-weights", **job.adapter, **task_fields(job, base), **changes})


def task_fields(job: Job, base: transformers.PreTrainedModel) -> dict[str, Any]:
    """The fields of a config of any of PEFT's methods that a job's task, its heads and new modules call for."""
    saved = job.adapter.get("modules_to_save")
    if saved is None:
        saved = find_heads(base) if job.task == "image-classification" else []
    new = new_beside_heads(base, [*saved, *_SAVED_BY_PEFT.get(job.task, ())])
    return {"task_type": _TASK_TYPE[job.task], "modules_to_save": [*saved, *new] or None}


def trained_whole(job: Job, base: transformers.PreTrainedModel) -> list[str]:
    """Full names of what is trained whole beside an adapter: heads, and what the base's checkpoint lacks."""
    named = [*(task_fields(job, base)["modules_to_save"] or ()), *_SAVED_BY_PEFT.get(job.task, ())]
    return [n for n, _ in base.named_modules() if any(n == name or n.endswith(f".{name}") for name in named)]


def new_beside_heads(base: transformers.PreTrainedModel, heads: list[str]) -> list[str]:
    """What the base's checkpoint had no weights for, but for what lies in `heads`, named as PEFT names modules."""
    found: list[str] = []
    for name in base.new_modules:
        parts = name.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if not any(outer in found or outer.endswith(tuple(heads)) for outer in around):
            found.append(name)
    return found


def find_heads(model: nn.Module) -> list[str]:
    """Names of a transformers image classifier's heads.

    Raises:
        ValueError: none found; says how to name it.
    """
    heads = task_heads(model)
    if not heads:
        raise ValueError(
            f"no classifier head found among {', '.join(name for name, _ in model.named_children())} of "
            f"{type(model).__name__}; name it with adapter.modules_to_save=[…]"
        )
    return heads


def load_collator(job: Job, base: transformers.PreTrainedModel) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """What makes a batch of model inputs from rows of data, for the job's task and base model."""
    model, columns = str(Path(job.model).expanduser()), job.data.columns
    if job.task == "image-classification":
        with muted("transformers.utils.import_utils"):  # it announces at each start that torchvision is not installed
            encode = transformers.AutoImageProcessor.from_pretrained(model)
        mode = "L" if getattr(base.config, "num_channels", 3) == 1 else "RGB"
        return ImageCollator(encode, columns["image"], mode)
    encode = load_tokenizer(model, base)
    limits = (job.data.max_length, encode.model_max_length, getattr(base.config, "max_position_embeddings", None))
    length = min(limit for limit in limits if limit and limit > 0)  # XLNet, which has no limit, says -1
    if job.task == "text-classification":
        return TextCollator(encode, columns["text"], columns.get("text_pair"), length)
    return CausalCollator(encode, columns["text"], columns.get("prompt"), length)


def load_tokenizer(model: str, base: transformers.PreTrainedModel) -> Any:
    """The tokenizer of a hub id or a folder; it and the base's config have a padding token afterwards."""
    encode = transformers.AutoTokenizer.from_pretrained(model)
    if encode.pad_token_id is None:
        if encode.eos_token_id is None:
            raise ValueError(f"the tokenizer of model '{model}' has neither a padding nor an end token; it needs one")
        encode.pad_token = encode.eos_token
    if base.config.pad_token_id is None:
        base.config.pad_token_id = encode.pad_token_id  # sequence classifiers find the last real token by it
    return encode


class ImageCollator:
    """PIL images → `pixel_values` by the model's own image processor, with and without torchvision."""

    def __init__(self, encode: Any, column: str, mode: str) -> None:
        self.encode, self.column, self.mode = encode, column, mode

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row[self.column].convert(self.mode) for row in rows]
        batch = self.encode(images, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "labels": torch.tensor([row[LABEL_ID] for row in rows])}


class TextCollator:
    """Texts, or pairs of texts, → token ids padded to the longest of the batch."""

    def __init__(self, encode: Any, text: str, pair: str | None, max_length: int) -> None:
        self.encode, self.text, self.pair, self.max_length = encode, text, pair, max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [row[self.text] for row in rows]
        pairs = [row[self.pair] for row in rows] if self.pair else None
        batch = self.encode(
            texts, pairs, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([row[LABEL_ID] for row in rows])}


class CausalCollator:
    """Texts with an end token → token ids and labels; a prompt before the text is read but not learned.

    What is too long loses the beginning of its prompt, then its end: there is always something to learn.
    """

    def __init__(self, encode: Any, text: str, prompt: str | None, max_length: int) -> None:
        self.encode, self.text, self.prompt, self.max_length = encode, text, prompt, max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids, labels = zip(*(self._example(row) for row in rows), strict=True)
        width = max(len(row) for row in ids)
        pad = self.encode.pad_token_id
        return {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
        }

    def _example(self, row: dict) -> tuple[list[int], list[int]]:
        prompt = self.encode(row[self.prompt])["input_ids"] if self.prompt else []
        text = self.encode(row[self.text], add_special_tokens=not prompt)["input_ids"]
        answer = text if self.encode.eos_token_id is None else [*text, self.encode.eos_token_id]
        prompt = prompt[-max(self.max_length - len(answer), 1) :]
        return (prompt + answer)[: self.max_length], ([IGNORED] * len(prompt) + answer)[: self.max_length]


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Mutes one logger up to warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
