"""`flora compare` on the tiny jobs: equal parameters, rates from the validation split, resuming, bad input."""

import io
import json
import math
from collections import Counter

import pytest
from commands import flora
from rich.console import Console

from florapeft.cli.compare import _show
from florapeft.report.run import read_run
from florapeft.train import compare
from florapeft.train.job import load_job
from florapeft.train.save import write_json

SHORT = ["train.max_steps=2", "train.per_device_train_batch_size=4"]


@pytest.fixture(scope="module")
def arguments(jobs):
    """The tiny text job, with a part of its training file as validation split and its validation file as test."""
    first, model, data = jobs["text-classification"][:3]
    splits = ["data.splits={validation: 'train[:8]', train: 'train[8:]', test: validation}"]
    return [first, model, data, *splits, *SHORT]


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "run"
    options = ["--methods", "lora,head,full", "--seeds", "0,1", "--rates", "1e-3,1e-2", "-o", folder, "--json"]
    return folder, json.loads(flora("compare", *arguments, *options)[0])


def test_record(compared):
    folder, record = compared
    assert json.loads((folder / "results.json").read_text()) == record
    assert [row["method"] for row in record["methods"]] == ["flora", "lora", "head", "full"]
    flora_row, lora, head, full = record["methods"]
    assert lora["is_equal"] == (abs(lora["parameters"] / flora_row["parameters"] - 1) <= 0.02)
    assert head["parameters"] == 0
    assert full["share_of_network"] == 1
    assert len({row["head_parameters"] for row in record["methods"]}) == 1
    assert len(record["trials"]) == 4 * 3  # two rates with the first seed, one with the second
    for row in record["methods"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        searched = [t for t in record["trials"] if (t["method"], t["seed"]) == (row["method"], 0)]
        best = max(t["validation_accuracy"] for t in searched)
        assert next(t for t in searched if t["rate"] == row["rate"])["validation_accuracy"] == best
    assert set(lora["difference"]) == {"mean", "low", "high"}
    assert lora["difference"]["mean"] == pytest.approx(lora["accuracy_mean"] - flora_row["accuracy_mean"])
    assert "difference" not in flora_row


def test_folder_is_a_run(compared):
    folder, record = compared
    run = read_run(folder, folder / "adapter")
    assert [method.label for method in run.methods] == ["FLoRA", "LoRA", "new head only", "full fine-tuning"]
    assert run.metric == "accuracy"
    measured = json.loads(flora("eval", folder, "--split", "test", "--json")[0])
    assert measured["accuracy"] == record["methods"][0]["runs"][0]["accuracy"]


def test_what_fails_leaves_an_earlier_run_where_it_is(compared, arguments):
    folder, record = compared
    wrong = ["adapter.target_modules=[nix]", "-o", folder, "--overwrite"]
    _, stderr = flora("compare", *arguments, *wrong, code=1)
    assert "nix" in stderr
    assert json.loads((folder / "results.json").read_text()) == record


def test_resuming_trains_only_what_is_missing(compared, arguments, monkeypatch, tmp_path):
    folder, record = compared
    results = json.loads((folder / "results.json").read_text())
    results["trials"] = [t for t in results["trials"] if (t["method"], t["seed"]) != ("full", 1)]
    (folder / "results.json").write_text(json.dumps({"trials": results["trials"]}))
    trained, train = [], compare._train

    def counted(comparison, method, rate, seed, callbacks):
        trained.append((method, seed))
        return train(comparison, method, rate, seed, callbacks)

    monkeypatch.setattr(compare, "_train", counted)
    options = ["--methods", "lora,head,full", "--seeds", "0,1", "--rates", "1e-3,1e-2", "-o", folder]
    again = json.loads(flora("compare", *arguments, *options, "--resume", "--json")[0])
    assert trained == [("full", 1)]
    assert [row["accuracy_mean"] for row in again["methods"]] == [row["accuracy_mean"] for row in record["methods"]]
    _, stderr = flora("compare", *arguments, "train.max_steps=3", *options, "--resume", code=1)
    change = "it began with train.max_steps = 2, now train.max_steps = 3"
    assert stderr.splitlines()[-1] == f"error: cannot resume {folder}: {change}"


@pytest.mark.parametrize(("rates", "seeds"), [("1e-5", "0"), ("1e-2,1e-5", "0"), ("1e-2", "1"), (None, "0")])
def test_the_adapter_is_that_of_the_rate_that_is_chosen_now(arguments, rates, seeds, monkeypatch, tmp_path):
    """Issue: after resuming with other rates the adapter was still that of the best rate of all."""
    scores = {1e-2: 0.9, 1e-5: 0.1, 1e-3: 0.2}
    evaluate = compare.evaluate
    monkeypatch.setattr(
        compare,
        "evaluate",
        lambda trainer, *rows: {**evaluate(trainer, *rows), "accuracy": scores[trainer.args.learning_rate]},
    )
    monkeypatch.setattr(compare, "climb", lambda middle, score: max([1e-3, 1e-5], key=score))
    options = ["--methods", "head", "-o", tmp_path / "run", "--json"]
    flora("compare", *arguments, *options, "--seeds", "0", "--rates", "1e-2,1e-5")
    more = ["--rates", rates] if rates else []
    record = json.loads(flora("compare", *arguments, *options, "--seeds", seeds, *more, "--resume")[0])
    job = load_job(tmp_path / "run" / "adapter" / "job.yaml")
    assert job.train["learning_rate"] == record["methods"][0]["rate"]
    assert job.train["seed"] == int(seeds)
    made = [(t["rate"], t["seed"]) for t in record["trials"] if t["method"] == "flora"]
    assert len(set(made)) == len(made)


def test_a_perplexity_that_is_not_finite_is_the_worst_also_after_resuming(jobs, tmp_path):
    job = load_job(jobs["causal-lm"][0], [*jobs["causal-lm"][1:], f"output={tmp_path}"])
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    trial = {"method": "flora", "seed": 0, "rate": 1e-3, "perplexity": math.inf, "validation_perplexity": math.inf}
    write_json(tmp_path / "results.json", {"trials": [trial]})
    assert compare._earlier_trials(job, tmp_path, print) == [trial]


_BY_GRADIENTS = ["gradient_batches=1", "adapter.budget=0.1"]


@pytest.mark.parametrize("more", [[], _BY_GRADIENTS, [*_BY_GRADIENTS, "adapter.allocation=spectrum"]])
def test_language_models_are_compared_by_perplexity(jobs, more, tmp_path):
    first, model, data = jobs["causal-lm"][:3]
    splits = "data.splits={test: 'train[:4]', train: 'train[4:]'}"
    options = ["--methods", "lora", "--seeds", "3", "--rates", "1e-3", "-o", tmp_path / "run"]
    stdout, _ = flora("compare", first, model, data, "data.holdout=0.25", splits, *SHORT, *more, *options)
    assert "perplexity on the test split; mean ± standard deviation over 1 seeds" in " ".join(stdout.split())
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["methods"][1]["difference"]["low"] is None
    assert record["methods"][0]["perplexity_mean"] > 1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["init_weights"] == "gradient") == bool(more)


def test_without_rates_a_walk_from_the_jobs_own(arguments, tmp_path, monkeypatch):
    def train(comparison, method, rate, seed, callbacks):
        score = -abs(rate - 1.6e-4)
        run = {"method": method, "rate": rate, "seed": seed, "validation_accuracy": score, "accuracy": score}
        counts = {"parameters": 1, "head_parameters": 1, "network_parameters": 1, "bytes": 1, "seconds": 1}
        return {**run, **counts, "losses": []}

    monkeypatch.setattr(compare, "_train", train)
    options = ["--methods", "full", "--seeds", "0", "-o", tmp_path / "run", "--json"]
    record = json.loads(flora("compare", *arguments, *options)[0])
    assert [row["rate"] for row in record["methods"]] == [1.6e-4, 1.6e-4]
    assert record["methods"][0]["rates"] == [5e-5, 1.6e-4, 5e-4, 1.6e-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "lora, lohra"], "no method 'lohra'; did you mean 'lora'? (known: flora, lora, "),
        (["--seeds", "0,0"], "seeds must be different whole numbers, at least one; got [0, 0]"),
        (["--rates", "-1"], "rates must be positive numbers, at least one; got [-1.0]"),
        (["data.splits={validation: validation}"], "has no split 'test'"),
    ],
)
def test_bad_input_leaves_nothing(arguments, options, message, tmp_path):
    _, stderr = flora("compare", *arguments, *options, "-o", tmp_path / "run", code=1)
    assert message in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("width", [80, 50])
def test_a_narrow_table_shows_every_character(width):
    row = {"label": "full fine-tuning", "accuracy_mean": 0.9371, "accuracy_std": 0.0123, "rate": 1.6e-4}
    row |= {"parameters": 12345678, "share_of_network": 0.0123, "seconds_mean": 1234.5}
    row["difference"] = {"mean": -0.0123, "low": -0.1234, "high": 0.1001}
    record = {"metric": "accuracy", "description": "model on data", "seeds": [0], "methods": [row], "adapter": "a"}
    shown = []
    for columns in (width, 200):
        console = Console(file=io.StringIO(), width=columns)
        _show(console, record)
        shown.append(Counter(console.file.getvalue().replace("─", "").replace("\n", "").replace(" ", "")))
    assert shown[0] == shown[1]


def test_usage(arguments):
    assert "a job file is needed first" in flora("compare", "adapter.r=4", code=2)[1]
    assert "is not whole numbers" in flora("compare", *arguments, "--seeds", "1.5", code=2)[1].replace("\n", " ")
