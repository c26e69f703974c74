"""The `flora` command: jobs end to end on tiny models and data, bad input, kill and resume, two processes."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
import typer
from commands import flora
from rich.console import Console
from safetensors.torch import load_file, save_file

import florapeft.cli
from florapeft.cli import _output
from florapeft.cli._adapter import parse_targets
from florapeft.retraction import is_orthonormal
from florapeft.train import merge as merge_module
from florapeft.train import run as run_module

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "florapeft.cli"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, jobs):
    """Every example job, run once for two epochs: its output folder and its record."""
    runs = {}
    for task, arguments in jobs.items():
        output = tmp_path_factory.mktemp("runs") / task
        stdout, stderr = flora("train", *arguments, "train.num_train_epochs=2", f"output={output}", "--json")
        runs[task] = output, json.loads(stdout), stderr
    return runs


TASKS = ["image-classification", "text-classification", "causal-lm"]


@pytest.mark.parametrize("task", TASKS)
def test_example_job(task, trained, tiny):
    output, record, stderr = trained[task]
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter",
        "checkpoints",
        "job.yaml",
        "logs",
        "results.json",
    ]
    assert sorted(path.name for path in (output / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "job.yaml",
    ]
    assert any(path.name.startswith("events.out.tfevents") for path in (output / "logs").iterdir())
    assert json.loads((output / "results.json").read_text()) == record
    assert record["steps"] > 0
    assert (record["parameters"]["head"] > 0) == (task != "causal-lm")
    lines = [line for line in stderr.splitlines() if not line.startswith("note: Ranks above")]  # libraries say nothing
    model = tiny / task.split("-")[0] / "model"
    assert lines[:2] == ["loading the data", f"loading the model {model}"]
    assert lines[2:] == [f"training on {record['examples']['train']} examples"]
    keys = load_file(output / "adapter" / "adapter_model.safetensors").keys()
    assert all(".flora_" in key or ".classifier." in key for key in keys)  # only the adapter and the head


@pytest.mark.parametrize("task", TASKS)
def test_eval_of_the_saved_adapter_is_the_validation_figure(task, trained):
    output, record, _ = trained[task]
    measured = json.loads(flora("eval", output, "--json")[0])
    assert measured["split"] == "validation"
    assert measured["examples"] == record["examples"]["validation"]
    for name, value in record["validation"].items():
        assert measured[name] == value
    shown = flora("eval", output / "adapter", "--split", "train")[0].split()
    assert shown[shown.index("split") + 1] == "train"
    assert shown[shown.index("examples") + 1] == str(record["examples"]["train"])


@pytest.mark.parametrize("task", TASKS)
def test_report_of_a_run(task, trained, tmp_path):
    output, run, _ = trained[task]
    record = json.loads(flora("report", output, "-o", tmp_path / "report.html", "--json")[0])
    assert record["notes"] == []  # the base is at hand: its network, and every weight
    assert all(layer["relative"] > 0 for layer in record["layers"])
    assert record["parameters"] == run["parameters"]["adapter"]
    page = (tmp_path / "report.html").read_text()
    for shown in ("validation loss", "the order of the network", f"flora train {output}/adapter/job.yaml"):
        assert shown in page


@pytest.mark.parametrize("task", TASKS)
def test_merge_gives_what_peft_gives(task, trained, tiny, tmp_path):
    output, _, _ = trained[task]
    record = json.loads(flora("merge", output, "-o", tmp_path / "merged", "--json")[0])
    assert record["relative_difference"] < 1e-5
    assert not list((tmp_path / "merged").glob("*.bin"))
    auto = {
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[task]
    labels = {} if task == "causal-lm" else {"num_labels": 2, "ignore_mismatched_sizes": True}
    base = auto.from_pretrained(tiny / task.split("-")[0] / "model", **labels)
    model = peft.PeftModel.from_pretrained(base, str(output / "adapter")).eval()
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    inputs = merge_module.random_inputs(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits)
    if task == "image-classification":
        assert merged.config.id2label == {0: "green", 1: "red"}
    _, stderr = flora("merge", output, "-o", tmp_path / "merged", code=1)
    assert "exists; give another output, or replace it with --overwrite" in stderr
    flora("merge", output, "-o", tmp_path / "merged", "--overwrite")


def test_merge_writes_nothing_when_outputs_differ(trained, tmp_path, monkeypatch):
    outputs = merge_module._outputs
    calls = []

    def differ(model, inputs):
        calls.append(model)
        return outputs(model, inputs) + (len(calls) > 2)

    monkeypatch.setattr(merge_module, "_outputs", differ)
    _, stderr = flora("merge", trained["causal-lm"][0], "-o", tmp_path / "merged", code=1)
    assert stderr.endswith(
        "error: the merged model, read back, gives other outputs than in memory; nothing was written\n"
    )
    assert not any(tmp_path.iterdir())


def test_merge_does_not_replace_a_folder_that_is_not_its_own(trained, tmp_path):
    (tmp_path / "photo.png").touch()
    _, stderr = flora("merge", trained["causal-lm"][0], "-o", tmp_path, "--overwrite", code=1)
    assert f"error: {tmp_path} was not written by flora merge; give another output" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_bf16(jobs, tmp_path):
    stdout, _ = flora("train", *jobs["text-classification"], "train.bf16=true", f"output={tmp_path}/o", "--json")
    assert 0 < json.loads(stdout)["validation"]["loss"] < 2
    weights = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_table_for_people(jobs, tmp_path):
    stdout, _ = flora("train", *jobs["text-classification"], "train.max_steps=1", f"output={tmp_path}/o")
    for expected in (
        "validation accuracy",
        "2,496 parameters, 64.43% of the network's",
        "34 parameters",
        f" saved to {tmp_path}/o/adapter\n",
    ):
        assert expected in stdout


# --- bad input --------------------------------------------------------------------------------------------------------

TEXT = "text-classification"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "job file not found: nothing.yaml"),
        (
            [TEXT, "task=text-clasification"],
            "text-classification.yaml: unknown task 'text-clasification'; did you mean",
        ),
        ([TEXT, "modle=x"], "text-classification.yaml: unknown key 'modle'; did you mean 'model'?"),
        ([TEXT, "model=./nowhere"], "model folder not found: ./nowhere"),
        ([TEXT, "model=some/where"], "cannot load model 'some/where' for text-classification: We couldn't connect"),
        (
            [TEXT, "data.columns.text=sentense"],
            "has no column 'sentense' (data.columns.text); it has: sentence, label; did",
        ),
        ([TEXT, "labels=[good, fine]"], "label 'bad' (split train, row 1) is not one of the 2 labels: good, fine"),
        ([TEXT, "adapter.r=0"], "r must be a positive integer or one per mode, got 0"),
        (
            ["causal-lm", "adapter.target_modules=[c_atn]"],
            "['c_atn'] not found in the base model. Did you mean 'c_attn'",
        ),
        ([TEXT, "train.learning_rate=fast"], "train: learning_rate must be a number, got 'fast'"),
        ([TEXT, "train.lr_scheduler_type=cosin"], "train: cosin is not a valid SchedulerType"),
        (
            [TEXT, "task=image-classification", "data.columns={}"],
            "has no column 'image' (data.columns.image); it has: ",
        ),
    ],
)
def test_train_errors(arguments, message, jobs, tmp_path):
    if arguments[0] in jobs:
        arguments = [*jobs[arguments[0]], f"output={tmp_path}/o", *arguments[1:]]
    stdout, stderr = flora("train", *arguments, code=1)
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in stderr
    assert not any((tmp_path / "o").glob("*"))  # so the job, put right, can be run again as it stands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "job.yaml", "oops"], "'oops' is neither the first argument, a job file, nor of the form key=value"),
        (["train", "--nonsense"], "No such option: --nonsense"),
        (["eval"], "Missing argument 'adapter'"),
        (["eval", "x", "--split", "dev"], "'dev' is not train, validation or test"),
        (["merge", "x"], "Missing option"),
        (["mege"], "No such command 'mege'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    _, stderr = flora(*arguments, code=2)
    assert message in stderr


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_adapters_that_cannot_be_used(command, trained, tmp_path):
    rest = ["-o", tmp_path / "m"] if command == "merge" else []
    _, stderr = flora(command, tmp_path / "none", *rest, code=1)
    assert stderr == f"error: adapter not found: {tmp_path}/none\n"
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (trained[TEXT][0] / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    _, stderr = flora(command, folder, *rest, code=1)
    assert stderr.splitlines()[-1].startswith("error: ")
    file = folder / "adapter_model.safetensors"
    for size in (file.stat().st_size - 1, 4):
        os.truncate(file, size)
        _, stderr = flora(command, folder, *rest, code=1)
        assert stderr.startswith(f"error: cannot read {file}: ")
        assert stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]


def test_eval_on_other_data(trained, jobs, tmp_path):
    output, _, _ = trained[TEXT]
    (tmp_path / "new.csv").write_text("sentence,label\nthe film was bad,bad\n")
    arguments = (f"data.path={tmp_path}/new.csv", "data.splits={test: train}")
    for config in ([], [jobs[TEXT][0], jobs[TEXT][1]]):
        assert json.loads(flora("eval", output, *config, *arguments, "--json")[0])["examples"] == 1
    (tmp_path / "new.csv").write_text("sentence,label\nthe film was odd,odd\n")
    _, stderr = flora("eval", output, *arguments, code=1)
    assert stderr.endswith("error: label 'odd' (split test, row 0) is not one of the 2 labels: bad, good\n")
    (tmp_path / "bare").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((output / "adapter" / name).read_bytes())
    _, stderr = flora("eval", tmp_path / "bare", code=1)
    assert stderr == f"error: {tmp_path}/bare holds no job.yaml; give a job file that says task, model and data\n"


def test_output_is_never_overwritten_unasked(jobs, tmp_path):
    arguments = ["train", *jobs["causal-lm"], "train.max_steps=1", f"output={tmp_path}/o"]
    flora(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    _, stderr = flora(*arguments, code=1)
    assert stderr == (
        f"error: output {tmp_path}/o exists; give another output, continue it with --resume, "
        "or replace it with --overwrite\n"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == before
    _, stderr = flora(*arguments, "--overwrite")
    assert f"the earlier run in {tmp_path}/o was renamed to {tmp_path}/o.old-1" in stderr
    for path, content in before.items():
        assert (tmp_path / "o.old-1" / path.relative_to(tmp_path / "o")).read_bytes() == content
    _, stderr = flora(*arguments, "adapter.r=2", "--resume", code=1)
    assert f"error: cannot resume {tmp_path}/o: it began with adapter.r = 8, now adapter.r = 2\n" in stderr


@pytest.mark.parametrize(
    "typo",
    [
        ["data.path=/none.jsonl"],
        ["model=/none"],
        ["adapter.target_modules=[no]"],
        ["adapter.target_modules=[no]", "gradient_batches=1"],  # found after a head has been warmed up
    ],
)
def test_a_job_that_cannot_begin_leaves_an_earlier_run_in_its_place(typo, jobs, tmp_path):
    for output, more in ((tmp_path / "earlier", ["--overwrite"]), (tmp_path / "new", [])):
        output.mkdir()
        if more:
            (output / "job.yaml").write_text("of the earlier run")
        before = sorted(tmp_path.rglob("*"))
        flora("train", *jobs[TEXT], *typo, f"output={output}", *more, code=1)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "earlier" / "job.yaml").read_text() == "of the earlier run"


def test_overwriting_nothing_renames_nothing(jobs, tmp_path):
    arguments = [*jobs[TEXT], "gradient_batches=1", "train.max_steps=1", f"output={tmp_path}/o", "--overwrite"]
    assert "renamed" not in flora("train", *arguments)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_failed_evaluation_leaves_the_adapter(jobs, tmp_path, monkeypatch):
    def fail(trainer):
        raise OSError("image file is truncated")

    monkeypatch.setattr(run_module, "evaluate", fail)
    arguments = ["train.save_strategy=no", "train.eval_strategy=no", "train.max_steps=1", f"output={tmp_path}/o"]
    _, stderr = flora("train", *jobs["causal-lm"], *arguments, code=1)
    assert stderr.endswith("error: image file is truncated\n")
    assert json.loads(flora("eval", tmp_path / "o", "--json")[0])["examples"]


def test_the_best_checkpoint_needs_no_more_than_its_own_key(jobs, tiny, tmp_path):
    arguments = ["train", *jobs[TEXT], "train.load_best_model_at_end=true", "train.num_train_epochs=2"]
    flora(*arguments, f"output={tmp_path}/o")
    states = [json.loads(path.read_text()) for path in (tmp_path / "o").rglob("trainer_state.json")]
    last = max(states, key=lambda state: state["global_step"])
    assert last["best_metric"] == min(e["eval_loss"] for e in last["log_history"] if "eval_loss" in e)
    train_alone = f"data.path={tiny}/text/train.csv"
    _, stderr = flora(*arguments, train_alone, f"output={tmp_path}/no", code=1)
    assert "error: train.load_best_model_at_end needs a validation split" in stderr


def test_a_failed_save_keeps_the_earlier_adapter(jobs, tmp_path, monkeypatch):
    arguments = ["train", *jobs["causal-lm"], "train.save_strategy=no", "train.max_steps=1", f"output={tmp_path}/o"]
    flora(*arguments)
    adapter = tmp_path / "o" / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full(self, folder, **_):
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full)
    _, stderr = flora(*arguments, "--resume", code=1)
    assert stderr.endswith(f"error: cannot write {adapter}: No space left on device; {adapter} was left as it was\n")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert not list((tmp_path / "o").glob(".*"))


def test_results_file(jobs, tmp_path):
    arguments = ["train", *jobs["causal-lm"], "train.max_steps=1", "--results", tmp_path / "r.json"]
    flora(*arguments, f"output={tmp_path}/a")
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == 1
    _, stderr = flora(*arguments, f"output={tmp_path}/b", code=1)
    assert (
        stderr == f"error: results file {tmp_path}/r.json exists; it is not overwritten unless --overwrite is given\n"
    )
    assert not (tmp_path / "b").exists()


def test_debug_shows_the_traceback(tmp_path):
    _, stderr = flora("eval", tmp_path / "none", "--debug", code=1)
    assert "Traceback (most recent call last)" in stderr
    assert stderr.endswith(f"error: adapter not found: {tmp_path}/none\n")


class TestMarkup:
    """Issue: `runs/[v2]/m` was shown as `runs//m`, and a path with `[/]` was an error after the work was done."""

    PATH = "runs/[v2]/[/]/:eyes:/m"
    METHOD = {"label": PATH, "accuracy_mean": 0.9, "accuracy_std": 0.1, "parameters": 1, "share_of_network": 0.1}
    METHOD |= {"seconds_mean": 1.0, "head_parameters": 0, "bytes": 1, "rate": 1e-3, "is_equal": False}
    TABLE = {"description": PATH, "seeds": [0], "methods": [METHOD], "adapter": PATH, "metric": "accuracy"}
    RELOAD = {"accuracy_before": 1.0, "accuracy": 1.0, "equal": True}

    @pytest.mark.parametrize(
        ("command", "show", "record", "times"),
        [
            ("merge", "_show", {"output": PATH, "preprocessing": [PATH], "relative_difference": 0.0}, 2),
            ("compare", "_show", TABLE, 4),
            ("eval", "_show", {"adapter": PATH}, 1),
            ("train", "_show_builtin", {**TABLE, "gap_closed": None, "reload": RELOAD}, 3),
            ("report", "_show", {"report": PATH, "bytes": 1, "notes": [PATH], "png": PATH}, 3),
        ],
    )
    def test_of_results(self, command, show, record, times, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "200")
        with _output.reporting(as_json=False, debug=True) as output:
            output.result(record, getattr(importlib.import_module(f"florapeft.cli.{command}"), show))
        assert capsys.readouterr().out.count(self.PATH) == times

    def test_of_what_goes_on(self, capsys):
        with _output.reporting(as_json=False, debug=True) as output:
            output.say(self.PATH)
        assert capsys.readouterr().err == f"{self.PATH}\n"


@pytest.mark.parametrize("error", [ValueError("data"), KeyboardInterrupt()])
def test_a_bar_that_is_left_gives_the_cursor_back(error):
    terminal = io.StringIO()

    def command():
        with _output.reporting(False, False) as output:
            output.stderr = Console(file=terminal, force_terminal=True)
            output.stages()("reading", 1, 3)
            assert "\x1b[?25l" in terminal.getvalue()
            raise error

    with pytest.raises((typer.Exit, KeyboardInterrupt)):
        command()
    assert terminal.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (RuntimeError("size mismatch"), "RuntimeError: size mismatch (--debug shows where)"),
        (
            ModuleNotFoundError("No module named 'datasets'", name="datasets"),
            'datasets is not installed; this needs: pip install "florapeft[train]"',
        ),
        (
            ModuleNotFoundError("No module named 'zz'", name="zz"),
            "ModuleNotFoundError: No module named 'zz' (--debug s",
        ),
    ],
)
def test_errors_are_one_line(error, line):
    assert _output.one_line(error).startswith(line)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("florapeft.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        florapeft.cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == 'error: typer is not installed; this needs: pip install "florapeft[cli]"\n'


@pytest.mark.parametrize("command", ["train", "eval", "merge", "report"])
def test_help_shows_an_example(command):
    stdout, _ = flora(command, "--help")
    assert f"\n    flora {command} " in stdout
    for option in ("--json", "--debug"):
        assert option in stdout
    assert f"\n  {command} " in flora("--help")[0]
    assert flora("--version")[0] == f"florapeft {florapeft.__version__}\n"


# --- kill and resume, two processes -----------------------------------------------------------------------------------


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_does(jobs, tmp_path):
    steps = ["train.max_steps=40", "train.save_strategy=steps", "train.save_steps=4", "train.eval_strategy=no"]
    arguments = ["train", *jobs[TEXT], *steps, "train.per_device_train_batch_size=4", f"output={tmp_path}/o"]
    process = subprocess.Popen([*COMMAND, *arguments], env=environment(), stdout=subprocess.DEVNULL)
    first = tmp_path / "o" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert first.exists()
    assert not (tmp_path / "o" / "adapter").exists()
    stdout, stderr = flora(*arguments, "--resume", "--json")
    assert f"resuming from {tmp_path}/o/checkpoints/checkpoint-" in stderr
    assert json.loads(stdout)["steps"] == 40
    flora(*[f"output={tmp_path}/unbroken" if a.startswith("output=") else a for a in arguments])
    weights = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("o", "unbroken")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.slow
def test_torchrun_with_two_processes(jobs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "florapeft.cli", "train"]
    options = ["train.num_train_epochs=1", "train.per_device_train_batch_size=4", f"output={tmp_path}/o", "--json"]
    options += ["gradient_batches=2", "head_learning_rate=2e-3"]  # after a head warmed up by both
    result = subprocess.run(
        [*command, *jobs[TEXT], *options], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "destroy_process_group() was not called" not in result.stderr
    record = json.loads(result.stdout)  # printed once, by the first process
    assert record["gradients"]["warmup_epochs"] == 1
    assert record["gradients"]["batches"] == 2
    assert record["steps"] == 3  # 24 examples, 2 processes of 4 each
    adapter = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert all(is_orthonormal(factor) for name, factor in adapter.items() if ".flora_factors." in name)
    assert record["validation"]["loss"] == pytest.approx(0.693, abs=0.05)  # not twice that: see classification_loss
    assert len({path.name.split(".")[-2] for path in (tmp_path / "o" / "logs").iterdir()}) == 1  # one process wrote
    assert json.loads(flora("eval", tmp_path / "o", "--json")[0])["accuracy"] == record["validation"]["accuracy"]


@pytest.mark.parametrize("kind", ["image", "text", "causal"])
def test_plan_needs_no_weights(tiny, tmp_path, kind):
    config = (tiny / kind / "model" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    stdout, _ = flora("plan", tmp_path, "--budget", "5%", "--json")
    record = json.loads(stdout)
    limit = 0.05 * record["base_parameters"]
    assert record["layers"]
    assert 0.9 * limit < record["parameters"] <= limit
    stdout, _ = flora("plan", tmp_path, "--r", "2", "--targets", "all-linear" if kind != "image" else "all-weights")
    assert "parameters in" in stdout
    assert "memory of training before activations" in stdout


@pytest.mark.parametrize(("targets", "names"), [("query, value,", ["query", "value"]), (" all-linear ", "all-linear")])
def test_targets_are_read_with_spaces(targets, names):
    assert parse_targets(targets) == names


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere"], 1, "error: model folder not found: /nowhere"),
        ([".", "--budget", "1%"], 1, "error: cannot read the config of model '.'"),
        ([".", "--budget", "many"], 2, "'many' is neither a count nor a share such as 0.5%"),
        (["MODEL", "--budget", "0"], 1, "error: budget as a count must be at least 1, got 0"),
        (["MODEL", "--budget", "120%"], 1, "error: budget as a share of the base model must be between 0 and 1"),
        (["MODEL", "--budget", "1%", "--r", "4"], 1, "error: budget=0.01 and r=4 contradict each other"),
        (["MODEL", "--targets", "nothing"], 1, "not found in the base model"),
    ],
)
def test_plan_bad_input(tiny, arguments, code, message):
    _, stderr = flora("plan", *[tiny / "text" / "model" if a == "MODEL" else a for a in arguments], code=code)
    assert message in " ".join(stderr.replace("│", " ").split())
