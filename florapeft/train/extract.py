"""Writes the adapter that comes nearest to a fine-tuned model, from the folders of the model before and after."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from florapeft import FloraConfig, extract
from florapeft.batch_norm import has_statistics
from florapeft.sources import Weights, find, module_from_config, open_weights, read_config
from florapeft.survey import tied_names
from florapeft.targets import task_heads
from florapeft.train.record import versions
from florapeft.train.save import atomic_folder, to_json

RECORD_FILE = "flora_extract.json"  # marks a folder that `flora extract` wrote, which alone it may replace
_NEEDED = ("*.safetensors", "*.safetensors.index.json", "config.json")
_TASKS = {
    "ForSequenceClassification": ("text-classification", "SEQ_CLS"),
    "ForCausalLM": ("causal-lm", "CAUSAL_LM"),
    "LMHeadModel": ("causal-lm", "CAUSAL_LM"),
    "ForImageClassification": ("image-classification", None),
}


def extract_adapter(
    base: str,
    tuned: str,
    output: Path,
    fields: dict[str, Any],
    *,
    device: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Extracts the adapter from `base` to `tuned` and writes it to `output`; an interrupted run is gone on with.

    Until `output` appears, what is done is kept in a folder beside it. Kept in full are a classifier's head, unless
    `fields` names other modules to save, modules that the base lacks, and the running statistics of batch norms.

    Args:
        base: hub id or folder of the model before fine-tuning.
        tuned: hub id or folder of the model after it.
        output: folder to write; an existing one only with `overwrite`, and only if `flora extract` wrote it.
        fields: of the `FloraConfig`.
        device: where to compute.
        overwrite: replace an earlier extraction at `output`.
        say: called with a line at each stage.
        progress: called with the stage, how many weights are done, and of how many.

    Returns:
        The report, what it was made from, and with which versions.

    Raises:
        ValueError, OSError: what `florapeft.extract` raises, or an output that may not be replaced.
    """
    if output.exists() and overwrite and not (output / RECORD_FILE).is_file():
        raise FileExistsError(f"{output} was not written by flora extract; give another output")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output {output} exists; give another output, or replace it with --overwrite")
    folders = [_local(name) for name in (base, tuned)]
    named = str(folders[0].resolve()) if Path(base).expanduser().exists() else base
    skeleton = module_from_config(folders[1])
    given = read_config(folders[1])
    task, task_type = next((t for end, t in _TASKS.items() if type(skeleton).__name__.endswith(end)), (None, None))
    new = new_modules(skeleton, open_weights(folders[0], "base"))
    heads = fields.pop("modules_to_save", None) or classifier_heads(skeleton)
    fields["modules_to_save"] = list(dict.fromkeys([*heads, *new])) or None
    fields["save_batch_norm"] = any(map(has_statistics, skeleton.modules()))
    work = output.with_name(f".{output.name}.extracting")
    if work.is_dir():
        say(f"going on from what an earlier run left in {work}")
    config = FloraConfig(task_type=task_type, **fields)
    model = extract(*folders, config, device=device, work=work, progress=progress)
    record = {
        "base": named,
        "tuned": tuned,
        "output": str(output),
        "task": task,
        "labels": [name for _, name in sorted((given.get("id2label") or {}).items(), key=_number)] or None,
        **model.extraction.to_dict(),
        "versions": versions(),
    }
    with atomic_folder(output, replace=overwrite) as partial:
        model.peft_config["default"].base_model_name_or_path = named
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / RECORD_FILE).write_text(to_json(record) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return record | {"table": str(model.extraction)}


def _number(item: tuple[str, str]) -> int:
    """Of a class, from `id2label`: JSON has numbers as texts there, and "10" comes before "2"."""
    return int(item[0])


def classifier_heads(model: nn.Module) -> list[str]:
    """Names of a task model's heads, but for output embeddings: those are as large as the vocabulary."""
    try:
        embeddings = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # models without embeddings
        embeddings = None
    return [name for name in task_heads(model) if model.get_submodule(name) is not embeddings]


def new_modules(model: nn.Module, base: Weights) -> list[str]:
    """Names of the modules, outside the heads, that have weights of which `base` has none, such as a new pooler."""
    heads, groups = tuple(f"{head}." for head in task_heads(model)), tied_names(model)
    new = [
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if not name.startswith(heads) and find(base, groups[name], model.base_model_prefix) is None
    ]
    return [name for name in dict.fromkeys(new) if name]


def _local(name: str) -> Path:
    """The folder of this name, or that of the hub's model of this name, downloaded if it is not there yet."""
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model folder not found: {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a folder nor a model of the hub that can be read now") from error
