"""The built-in job of `flora train`, end to end on a few steps."""

import json
from pathlib import Path

import pytest
from commands import flora

from florapeft.train import comparison
from florapeft.train.digits import BUILTIN_SETTINGS


def test_builtin_job_on_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "seeds=[0,1]", "max_steps=2"]
    stdout, _ = flora(*arguments, "--json", "--results", "r.json")
    record = json.loads(stdout)
    assert json.loads(Path("r.json").read_text()) == json.loads(Path("runs/digits/results.json").read_text()) == record
    assert [method["method"] for method in record["methods"]] == ["head", "flora", "full"]
    head, adapter, full = record["methods"]
    assert head["parameters"] == 0
    assert adapter["share_of_network"] <= 0.10
    assert full["share_of_network"] == 1.0
    assert record["reload"]["equal"] is True
    for run in adapter["runs"]:
        assert run["accuracy"] == run["accuracy_reloaded"]
        assert (Path(run["adapter"]) / "adapter_model.safetensors").stat().st_size == run["bytes"]
    assert sorted(path.name for path in Path("runs/digits").iterdir()) == [
        "adapter",
        "adapter-seed-1",
        "job.yaml",
        "results.json",
    ]
    measured = json.loads(flora("eval", "runs/digits", "--json")[0])
    assert measured["accuracy"] == adapter["runs"][0]["accuracy"]
    merged = json.loads(flora("merge", "runs/digits", "-o", "merged", "--json")[0])
    assert merged["relative_difference"] < 1e-5

    stdout, stderr = flora("train", "seeds=[0]", "max_steps=1")  # again: the default folder is taken, nothing is lost
    assert "runs/digits exists, so this run goes to runs/digits-2" in stderr
    for expected in ("new head only", "FLoRA", "full fine-tuning", "runs/digits-2/adapter", "(equal)"):
        assert expected in stdout


def test_builtin_job_is_not_resumed_and_says_so(tmp_path):
    (tmp_path / "job.yaml").touch()
    _, stderr = flora("train", f"output={tmp_path}", code=1)
    assert stderr == f"error: output {tmp_path} exists; give another output, or replace it with --overwrite\n"


def test_builtin_job_fails_if_the_reloaded_adapter_is_not_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "evaluate_builtin", lambda folder: {"accuracy": 0.0})
    stdout, stderr = flora("train", "seeds=[0]", "max_steps=1", f"output={tmp_path}/o", code=1)
    assert "(NOT EQUAL)" in stdout
    assert stderr.endswith("error: the adapter, reloaded from disk, is not as accurate as it was; see results.json\n")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.budget=0.05"], {"budget": 0.05}),
        (["adapter.r=null", "adapter.budget=2000", "seeds=null"], {"budget": 2000}),
        (["adapter.r=2"], {"r": 2}),
    ],
)
def test_ranks_of_the_builtin_job_can_be_replaced(overrides, expected):
    settings, _ = comparison._settings(overrides)
    rest = {key: value for key, value in BUILTIN_SETTINGS["adapter"].items() if key != "r"}
    assert settings.adapter == {**rest, **expected}
    assert settings.seeds == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs a job file: the built-in job is short and starts over"),
        (
            ["sed=[1]"],
            "the built-in job has no key 'sed'; did you mean 'seeds'? (known: output, seeds, max_steps, adapter)",
        ),
        (["r=2"], "the built-in job has no key 'r'; say adapter.r (known: output, "),
        (["seeds=3"], "seeds must be a list of whole numbers such as [0,1,2], got 3"),
        (["seeds=[1,1]"], "seeds must differ from each other, got [1, 1]"),
        (["adapter.rank=2"], "adapter: FloraConfig has no field 'rank'"),
    ],
)
def test_builtin_job_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = flora("train", *arguments, code=1)
    assert stdout == ""
    assert stderr.startswith(f"error: {message}")
    assert not any(tmp_path.iterdir())
