"""Writes the base model with an adapter's update merged in, and proves on a random input that it is the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from florapeft.train.evaluate import adapter_folder, read_job
from florapeft.train.extract import RECORD_FILE as EXTRACTION_FILE
from florapeft.train.model import check_is_whole, load_base, load_pretrained, load_tokenizer
from florapeft.train.record import versions
from florapeft.train.save import atomic_folder, to_json

RECORD_FILE = "flora_merge.json"  # marks a folder that `flora merge` wrote, which alone it may replace
_TASK_BY_TYPE = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "causal-lm"}
# By how much outputs may move, relative to the largest, where weights plus update round differently.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def merge_adapter(
    path: Path,
    output: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Merges the adapter at `path` into its base and writes the result to `output` in the base's own format.

    Before `output` appears, the merged model is read back and compared on a random input: equal to the merged model
    in memory, and within rounding of base plus adapter.

    Args:
        path: an adapter folder, or the output folder of a run.
        output: folder to write; an existing one only with `overwrite`, and only if `flora merge` wrote it.
        base: hub id or folder of the base; by default the one that adapter_config.json names.
        overwrite: replace an earlier merge at `output`.
        say: called with a line at each stage.

    Raises:
        ValueError, OSError: no adapter, no base, an output that may not be replaced, outputs that differ.
    """
    folder = adapter_folder(path)
    if output.exists() and overwrite and not (output / RECORD_FILE).is_file():
        raise FileExistsError(f"{output} was not written by flora merge; give another output")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output {output} exists; give another output, or replace it with --overwrite")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model; give it with --base")
    if base is None and Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"base model not found: {name} (named by {folder / 'adapter_config.json'}); use --base")
    say(f"loading the base {name} and the adapter {folder}")
    model = peft.PeftModel.from_pretrained(_load_base(folder, config, name), str(folder)).eval()
    check_is_whole(model)
    _find_padding(model.get_base_model(), name)
    inputs = random_inputs(model.get_base_model())
    expected = _outputs(model, inputs)
    merged = model.merge_and_unload(safe_merge=True).eval()
    in_memory = _outputs(merged, inputs)
    say("writing and reading back")
    with atomic_folder(output, replace=overwrite) as partial:
        merged.save_pretrained(partial)
        reloaded = type(merged).from_pretrained(partial, use_safetensors=True).eval()
        difference = _check(expected, in_memory, _outputs(reloaded, inputs))
        copied = _copy_preprocessing(name, partial)
        record = {
            "base": name,
            "adapter": str(folder),
            "output": str(output),
            "relative_difference": difference,
            "preprocessing": copied,
            "versions": versions(),
        }
        (partial / RECORD_FILE).write_text(to_json(record) + "\n", encoding="utf-8")
    return record


def random_inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A small random batch of the model's main input, images or token ids, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_ids":
        text = config.get_text_config()
        ids = torch.randint(0, text.vocab_size, (2 if text.pad_token_id is not None else 1, 8), generator=generator)
        if text.eos_token_id is not None:  # classifiers with a decoder read it, and want one in every row
            end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
            ids = ids.where(ids != end, (end + 1) % text.vocab_size)
            ids[:, -1] = end
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    raise ValueError(f"cannot check a merge of {type(model).__name__}: its main input is {model.main_input_name}")


def _load_base(folder: Path, config: dict[str, Any], name: str) -> transformers.PreTrainedModel:
    """The base with the head that the adapter was trained on, by its job file, else by what PEFT wrote down."""
    job = read_job(folder)
    if job is not None and job.get("task") != "builtin":
        return load_base(job["task"], name, job.get("labels"))
    if job is not None:
        from florapeft.train.comparison import load_network

        return load_network(name, job["labels"])
    if (folder / EXTRACTION_FILE).is_file():
        record = json.loads((folder / EXTRACTION_FILE).read_text(encoding="utf-8"))
        if record.get("task"):
            return load_base(record["task"], name, record.get("labels"))
    task = _TASK_BY_TYPE.get(config.get("task_type"))
    if task is not None:
        return load_base(task, name, None)
    # Only a class name is taken from the file, and only transformers is searched for it: no module is imported.
    class_name = (config.get("auto_mapping") or {}).get("base_model_class", "")
    cls = getattr(transformers, class_name, None) if class_name else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / 'adapter_config.json'} does not tell the base's class: no task_type, no model class"
        )
    return load_pretrained(cls, name)


def _find_padding(model: transformers.PreTrainedModel, name: str) -> None:
    """Sets the padding token, as training has, where there is a tokenizer: sequence classifiers go by it."""
    if model.main_input_name != "input_ids" or model.config.pad_token_id is not None:
        return
    try:
        load_tokenizer(name, model)
    except (OSError, ValueError, KeyError):  # no tokenizer beside the base
        return


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**inputs)
    return result["logits"] if "logits" in result else result[0]


def _check(expected: torch.Tensor, in_memory: torch.Tensor, reloaded: torch.Tensor) -> float:
    """The largest difference between base plus adapter and the merged model, relative to the largest output."""
    if not torch.equal(in_memory, reloaded):
        raise ValueError("the merged model, read back, gives other outputs than in memory; nothing was written")
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = ((expected - reloaded).abs().max() / scale).item()
    tolerance = _TOLERANCE.get(expected.dtype, 1e-4)
    if not difference <= tolerance:
        raise ValueError(
            f"merged outputs differ from base plus adapter by {difference:.1e} of the largest output "
            f"(allowed: {tolerance:.0e}); nothing was written"
        )
    return difference


def _copy_preprocessing(name: str, output: Path) -> list[str]:
    """Copies the base's tokenizer or image processor, so that the merged folder can be used by itself."""
    if Path(name).is_dir():
        copied = [file for file in Path(name).iterdir() if file.is_file() and _is_preprocessing(file.name)]
        for file in copied:
            shutil.copyfile(file, output / file.name)
        return sorted(file.name for file in copied)
    before = {file.name for file in output.iterdir()}
    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            auto.from_pretrained(name).save_pretrained(output)
        except (OSError, ValueError, KeyError):  # the base has none of this kind
            continue
    return sorted({file.name for file in output.iterdir()} - before)


def _is_preprocessing(name: str) -> bool:
    usual = (
        "tokenizer",
        "special_tokens_map",
        "added_tokens",
        "vocab",
        "merges",
        "spiece",
        "sentencepiece",
        "chat_template",
    )
    return name in _PREPROCESSING or (name.startswith(usual) and not name.endswith((".bin", ".pt", ".pkl")))
