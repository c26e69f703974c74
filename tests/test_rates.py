"""Two learning rates in one training: which parameters have which, and what refuses it."""

import io
import json

import pytest
import torch
import transformers
from commands import flora

from florapeft.train import compare, rates, run
from florapeft.train.job import load_job, parse_job
from florapeft.train.save import JOB_FILE

GOOD = {"task": "text-classification", "model": "m", "data": "d.csv", "output": "o"}
STEPS = ["train.learning_rate=1e-3", "train.max_steps=2", "train.per_device_train_batch_size=4", "train.warmup_steps=0"]
CONSTANT = "train.lr_scheduler_type=constant"


@pytest.fixture
def optimizers(monkeypatch):
    """Of every training: what is trained by name, with its learning rate and its weight decay."""
    seen = []
    make = run.make_trainer

    def watched(job, model, *arguments, **options):
        trainer = make(job, model, *arguments, **options)
        names = {parameter: name for name, parameter in model.named_parameters()}

        class Watch(transformers.TrainerCallback):
            def on_train_end(self, args, state, control, **more):
                groups = trainer.optimizer.param_groups
                seen.append({names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})

        trainer.add_callback(Watch())
        return trainer

    for module in (run, compare):
        monkeypatch.setattr(module, "make_trainer", watched)
    return seen


class TestGroups:
    def test_each_has_its_rate_and_the_trainers_weight_decay(self, jobs, tmp_path, optimizers):
        more = ["train.weight_decay=0.1", "adapter.bias=flora_only", CONSTANT, f"output={tmp_path}/o"]
        flora("train", *jobs["text-classification"], *STEPS, *more)
        flora(
            "train", *jobs["text-classification"], *STEPS, *more[:-1], "head_learning_rate=0.02", f"output={tmp_path}/p"
        )
        before, found = optimizers
        assert {rate for rate, _ in before.values()} == {1e-3}
        assert {name: decay for name, (_, decay) in found.items()} == {name: d for name, (_, d) in before.items()}
        assert {rate for name, (rate, _) in found.items() if ".flora_" in name} == {1e-3}
        assert {rate for name, (rate, _) in found.items() if ".flora_" not in name} == {0.02}
        assert any("bias" in name and "classifier" not in name for name in found)
        assert load_job(tmp_path / "p" / "adapter" / JOB_FILE).head_learning_rate == 0.02

    def test_the_schedule_is_that_of_both(self, jobs, tmp_path, optimizers):
        schedule = [
            "train.learning_rate=1e-3",
            "train.max_steps=4",
            "train.lr_scheduler_type=linear",
            "train.warmup_steps=8",
        ]
        flora("train", *jobs["text-classification"], *schedule, "head_learning_rate=0.02", f"output={tmp_path}/o")
        own = {rate for name, (rate, _) in optimizers[0].items() if ".flora_" in name}
        rest = {rate for name, (rate, _) in optimizers[0].items() if ".flora_" not in name}
        assert list(own) == [pytest.approx(0.5e-3)]  # after 4 of 8 steps of warm-up
        assert list(rest) == [pytest.approx(0.01)]
        log = json.loads((tmp_path / "o" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
        shown = [entry["learning_rate"] for entry in log["log_history"] if "learning_rate" in entry]
        assert all(rate < 1e-3 for rate in shown)

    def test_the_head_is_warmed_up_at_its_own(self, jobs, tmp_path, optimizers):
        more = ["gradient_batches=1", "adapter.budget=0.1", "head_learning_rate=0.02", CONSTANT]
        flora("train", *jobs["image-classification"], *STEPS, *more, f"output={tmp_path}/o")
        warm_up, training = optimizers
        assert {rate for rate, _ in warm_up.values()} == {0.02}
        assert {rate for rate, _ in training.values()} == {1e-3, 0.02}

    @pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
    def test_the_optimizer_is_the_jobs(self, name, tmp_path):
        fields = {
            "train": {"optim": name, "learning_rate": 0.1, "eval_strategy": "no"},
            "head_learning_rate": 3,
            "output": str(tmp_path),
        }
        job = parse_job({**GOOD, **fields})
        arguments = run.training_arguments(job)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, vocab_size=5
            )
        )
        model.new_modules = []
        trainer = transformers.Trainer(
            model, arguments, optimizer_cls_and_kwargs=rates.optimizer_of_two_rates(job, model, arguments)
        )
        plain = transformers.Trainer(model, arguments).create_optimizer()
        made = trainer.create_optimizer()
        assert isinstance(made, type(plain))
        assert str(type(made)) == str(type(plain))
        assert [group["lr"] for group in made.param_groups] == [0.1, 0.1, 3, 3]
        heads = {id(p) for group in made.param_groups[2:] for p in group["params"]}
        assert heads == {id(p) for p in model.classifier.parameters()}
        assert made.defaults == plain.defaults


def test_a_resumed_run_ends_where_an_unbroken_one_does(jobs, tmp_path):
    arguments = [*jobs["text-classification"], "train.per_device_train_batch_size=4", "train.num_train_epochs=2"]
    arguments += ["head_learning_rate=0.02", "train.save_total_limit=2"]
    flora("train", *arguments, f"output={tmp_path}/whole")
    flora("train", *arguments, f"output={tmp_path}/broken")
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (checkpoints[-1] / "trainer_state.json").unlink()
    flora("train", *arguments, f"output={tmp_path}/broken", "--resume")
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")
    )
    assert one == other
    _, stderr = flora("train", *arguments, "head_learning_rate=0.03", f"output={tmp_path}/broken", "--resume", code=1)
    assert stderr.endswith("it began with head_learning_rate = 0.02, now head_learning_rate = 0.03\n")


def test_every_method_of_a_comparison_has_the_heads_rate(jobs, tmp_path, optimizers):
    splits = ["data.splits={validation: 'train[:8]', train: 'train[8:]', test: validation}"]
    options = ["--methods", "lora,full,head", "--seeds", "0", "--rates", "0.003", "-o", tmp_path / "run", "--json"]
    more = [*splits, *STEPS, CONSTANT, "head_learning_rate=0.02"]
    record = json.loads(flora("compare", *jobs["text-classification"][:3], *more, *options)[0])
    assert record["settings"]["head_learning_rate"] == 0.02
    by_flora, by_lora, full, head = optimizers
    for found in (by_flora, by_lora, full):
        assert {rate for name, (rate, _) in found.items() if "classifier" in name} == {0.02}
        assert {rate for name, (rate, _) in found.items() if "classifier" not in name} == {0.003}
    assert {rate for rate, _ in head.values()} == {0.003}  # all that it trains has the rate that is looked for


@pytest.mark.parametrize("value", [0, -1e-3, "fast", True, float("inf"), float("nan"), [1e-3]])
def test_wrong_rates(value):
    with pytest.raises(ValueError, match=r"^job: head_learning_rate must be a positive number, got "):
        parse_job({**GOOD, "head_learning_rate": value})


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_job_without_a_head(jobs, tmp_path, command):
    splits = ["data.splits={test: 'train[:4]', train: 'train[4:]'}", "data.holdout=0.25", f"output={tmp_path}/o"]
    _, stderr = flora(command, *jobs["causal-lm"][:3], *splits, "head_learning_rate=0.02", code=1)
    found = stderr.splitlines()[-1]
    assert found.endswith("is for heads, adapter.modules_to_save and adapter.bias, and this job trains none")
    assert not list(tmp_path.rglob(JOB_FILE))


def test_optimizers_that_take_no_groups(tmp_path, monkeypatch):
    job = parse_job({**GOOD, "head_learning_rate": 0.1, "output": str(tmp_path)})
    arguments = run.training_arguments(job)
    model = torch.nn.Linear(2, 2)
    for cls, options in ((torch.optim.SGD, {"optimizer_dict": {}}), (io.StringIO, {})):
        monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_, c=cls, o=options: (c, o))
        with pytest.raises(ValueError, match=r"^head_learning_rate does not work with train\.optim=adamw_torch"):
            rates.optimizer_of_two_rates(job, model, arguments)


@pytest.mark.parametrize("which", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_parameters(which):
    job = parse_job({**GOOD, "head_learning_rate": 0.1})
    trainer = type("Trainer", (), {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, which: True})()
    with pytest.raises(ValueError, match=r"^head_learning_rate works in one process or several"):
        rates.check_not_sharded(job, trainer)
    rates.check_not_sharded(parse_job(GOOD), trainer)
