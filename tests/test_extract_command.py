"""`flora extract`: from two folders to an adapter that PEFT loads and `flora merge` merges; interrupted, refused."""

import json

import peft
import pytest
import torch
from commands import flora
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification
from typer.testing import CliRunner

import florapeft.train.extract as command
from florapeft.cli._app import app
from florapeft.cli._progress import StageProgress

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=12)


@pytest.fixture
def folders(tmp_path):
    """A pretrained encoder with another head, and a classifier of three labels that was made from it."""
    torch.manual_seed(0)
    base = BertForMaskedLM(CONFIG)
    base.save_pretrained(tmp_path / "base")
    config = BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=12, id2label={0: "a", 1: "b", 2: "c"})
    tuned = BertForSequenceClassification(config)
    tuned.bert.load_state_dict(base.bert.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in tuned.bert.named_parameters():
            if "embeddings" not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    tuned.eval().save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "config.json"  # as by a tool that sorts texts: "10" before "2"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"2": "c", "0": "a", "1": "b"}}))
    return tmp_path / "base", tmp_path / "tuned", tuned


def test_writes_an_adapter_that_peft_loads_and_flora_merges(folders, tmp_path):
    base, tuned, model = folders
    arguments = ("extract", base, tuned, "-o", tmp_path / "adapter", "--r", 100, "--bias", "all")
    record = json.loads(flora(*arguments, "--json")[0])
    assert record["error"] < 1e-6
    assert record["labels"] == ["a", "b", "c"]
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= set(record["kept"]), "which the base does not have"
    assert all("LayerNorm.weight" in lost["name"] for lost in record["lost"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "tuned"], "no working folder is left"

    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    merged = loaded.merge_and_unload()
    for name, value in model.state_dict().items():
        if "LayerNorm.weight" not in name:
            assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    flora("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    ids = torch.arange(10).reshape(2, 5)
    assert_close(again(ids).logits, merged(ids).logits)


def test_budget_and_table(folders, tmp_path):
    base, tuned, _ = folders
    stdout, _ = flora("extract", base, tuned, "-o", tmp_path / "adapter", "--budget", "10%", "--targets", "query,value")
    assert "bert.encoder.layer.0.attention.self.query" in stdout
    assert "lost: " in stdout
    record = json.loads((tmp_path / "adapter" / command.RECORD_FILE).read_text())
    assert {fit["name"].rpartition(".")[2] for fit in record["weights"]} == {"query", "value"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == str(base)


def test_is_gone_on_with_after_an_interruption(folders, tmp_path, monkeypatch):
    base, tuned, _ = folders

    def stop(self, stage, done, count):
        if (stage, done) == ("fitting", 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageProgress, "__call__", stop)
        CliRunner().invoke(app, ["extract", str(base), str(tuned), "-o", str(tmp_path / "adapter"), "--r", "2"])
    assert not (tmp_path / "adapter").exists()
    assert len(list((tmp_path / ".adapter.extracting").glob("*.tucker.safetensors"))) == 5
    _, stderr = flora("extract", base, tuned, "-o", tmp_path / "adapter", "--r", 2)
    assert "going on from what an earlier run left" in stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / ".adapter.extracting").exists()


def test_replaces_only_what_it_wrote(folders, tmp_path):
    base, tuned, _ = folders
    arguments = ("extract", base, tuned, "-o", tmp_path / "adapter", "--r", 1)
    flora(*arguments)
    _, stderr = flora(*arguments, code=1)
    assert "exists; give another output, or replace it with --overwrite" in stderr
    flora(*arguments, "--overwrite")
    (tmp_path / "adapter" / command.RECORD_FILE).unlink()
    _, stderr = flora(*arguments, "--overwrite", code=1)
    assert "was not written by flora extract" in stderr


def test_tuned_must_be_a_whole_model(folders, tmp_path):
    arguments = ("extract", folders[0], folders[1], "-o", tmp_path / "out")
    (folders[1] / "config.json").unlink()
    _, stderr = flora(*arguments, code=1)
    assert stderr == f"error: {folders[1]} has no config.json; a folder with a full fine-tuned model is needed\n"
    (folders[1] / "adapter_config.json").write_text("{}")
    _, stderr = flora(*arguments, code=1)
    assert stderr == (
        f"error: {folders[1]} is an adapter; a full fine-tuned model is needed (flora merge makes one of it)\n"
    )


def test_names_are_read_with_spaces(folders, tmp_path):
    options = ("--r", 1, "--targets", "query, value,", "--keep", "classifier, pooler", "-o", tmp_path / "adapter")
    flora("extract", folders[0], folders[1], *options)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"][:2]) == (["query", "value"], ["classifier", "pooler"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["BASE", "TUNED"], 2, "Missing option"),
        (["BASE", "TUNED", "-o", "OUT", "--budget", "5%", "--r", "4"], 2, "--budget and --r exclude each other"),
        (["BASE", "TUNED", "-o", "OUT", "--budget", "much"], 2, "'much' is neither a count nor a share"),
        (["BASE", "TUNED", "-o", "OUT", "--budget", "0"], 1, "budget as a count must be at least 1, got 0"),
        (["BASE", "./no-such", "-o", "OUT"], 1, "error: model folder not found: ./no-such"),
        (
            ["BASE", "somebody/no-such", "-o", "OUT"],
            1,
            "is neither a folder nor a model of the hub that can be read now",
        ),
        (["BASE", "TUNED", "-o", "OUT", "--targets", "qery"], 1, "Did you mean"),
        (["BASE", "TUNED", "-o", "OUT", "--targets", " ,"], 2, "Invalid value for --targets: no name is given"),
        (["BASE", "BASE", "-o", "OUT"], 1, "none of the 15 targets differs between base and tuned"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(folders, tmp_path, arguments, code, message):
    places = {"BASE": folders[0], "TUNED": folders[1], "OUT": tmp_path / "out"}
    _, stderr = flora("extract", *(places.get(argument, argument) for argument in arguments), code=code)
    assert message in " ".join(stderr.replace("│", " ").split())
    if code == 1:
        assert len(stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
