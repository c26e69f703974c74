"""A job with FLoRA and with other methods, at equal trainable parameters and several seeds: `flora compare`.

Every method takes its learning rate from the same grid, by the validation split and the first seed; what is reported is
the test split at that rate. With `gradient_batches`, every method begins with a warmed-up head: the same for the same
seed and rate, for it is warmed up at the trial's own rate.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from florapeft.train.data import Examples, load_examples, with_images
from florapeft.train.fitting import RIVALS, WITHIN, Fit, adaptable, adapted, attaches, fitting, shared, trainable
from florapeft.train.gradients import warm_heads, warmup_epochs
from florapeft.train.job import ROLES, Job, closest, load_job
from florapeft.train.model import attach, load_base, load_collator, muted, task_fields, trained_whole
from florapeft.train.rates import check_two_rates
from florapeft.train.record import commit, versions
from florapeft.train.run import (
    attach_adapter,
    check_same_job,
    count_parameters,
    evaluate,
    make_trainer,
    trainer_of_heads,
    training_arguments,
)
from florapeft.train.save import JOB_FILE, atomic_folder, atomic_write, check_output, set_aside, write_json
from florapeft.train.trials import climb, difference, spread

LABELS = {
    "flora": "FLoRA",
    **{name: rival.label for name, rival in RIVALS.items()},
    "head": "new head only",
    "full": "full fine-tuning",
}
OTHERS = ("lora", "dora", "loha", "lokr", "full")  # what FLoRA is compared with, unless it is said
RESULTS_FILE = "results.json"
_TRAIN = {  # nothing is written on the way, and nothing measured
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "load_best_model_at_end": False,
}

Say = Callable[[str], None]
Track = Callable[[str], transformers.TrainerCallback]


@dataclass
class Place:
    """Where another method acts and how large it is there: a fit to FLoRA's number, and the kinds left out."""

    fit: Fit
    layers: list[str]
    left_out: dict[str, str]


@dataclass
class Comparison:
    """A comparison under way: what is compared on what, and the trials that are done."""

    job: Job
    seeds: list[int]
    examples: Examples
    metric: str
    goal: int
    places: dict[str, Place]
    track: Track | None
    rates: Sequence[float] | None = None  # to choose from now; an earlier run may have had others
    trials: list[dict[str, Any]] = field(default_factory=list)

    def score(self, trial: dict[str, Any]) -> float:
        """Of a trial on the validation split, the higher the better; a perplexity counts negative."""
        value = trial[f"validation_{self.metric}"]
        return -value if self.metric == "perplexity" else value


def run_comparison(
    job: Job,
    others: Sequence[str] = OTHERS,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda text: None,
    track: Track | None = None,
) -> dict[str, Any]:
    """Trains the job with FLoRA as it says and with the other methods; returns and writes `<output>/results.json`.

    Every finished trial is kept there at once. `<output>/adapter` is FLoRA's with the first seed at its rate.

    Args:
        job: what to do; its data need a validation and a test split.
        others: methods of `LABELS` beside FLoRA.
        seeds: of heads, adapters and the order of the examples.
        rates: to choose from; None walks from the job's own rate until both neighbours are no better.
        resume: go on with the trials that are missing.
        overwrite: an earlier run in `<output>` is renamed instead of being an error.
        say: called with a line at each stage.
        track: makes a Trainer callback that shows the progress of the trial with the given name.

    Raises:
        ValueError, OSError: a method, seed, split or output that does not fit; one line each.
    """
    methods = ["flora", *_checked(job, others, seeds, rates)]
    say("loading the data")
    examples = load_examples(job, ROLES, ROLES)
    output = Path(job.output)
    check_output(output, resume=resume, overwrite=overwrite)
    trials = _earlier_trials(job, output, say) if resume else []
    job.labels = examples.labels
    say(f"loading the model {job.model}, and finding ranks with equal numbers of parameters")
    goal, places = _places(job, examples, [method for method in methods if method in RIVALS])
    if not resume:  # not before: what fails up to here leaves an earlier run where it is
        if overwrite and (note := set_aside(output)):
            say(note)
        atomic_write(output / JOB_FILE, job.to_yaml())
    metric = "perplexity" if job.task == "causal-lm" else "accuracy"
    comparison = Comparison(job, list(seeds), examples, metric, goal, places, track, rates, trials)
    chosen = {}
    for method in methods:
        chosen[method] = _search(comparison, method, rates, say)
        if method == "flora":
            _check_adapter(comparison, chosen[method], say)
        for seed in seeds:
            _trial(comparison, method, chosen[method], seed, say)
    record = _summary(comparison, chosen)
    write_json(output / RESULTS_FILE, record)
    return record


def _checked(job: Job, others: Sequence[str], seeds: Sequence[int], rates: Sequence[float] | None) -> list[str]:
    """The other methods, without FLoRA, which is always there."""
    for method in others:
        if method not in LABELS:
            raise ValueError(f"no method '{method}'{closest(method, LABELS)} (known: {', '.join(LABELS)})")
    if "head" in others and job.task == "causal-lm":
        raise ValueError("method 'head' trains a new head, and task causal-lm has none")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one; got {list(seeds)}")
    if rates is not None and not (rates and all(rate > 0 for rate in rates)):
        raise ValueError(f"rates must be positive numbers, at least one; got {list(rates)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("flora compare runs in one process; start it without torchrun or accelerate launch")
    return [method for method in dict.fromkeys(others) if method != "flora"]


def _earlier_trials(job: Job, output: Path, say: Say) -> list[dict[str, Any]]:
    """What is in the results file of the same comparison, where a perplexity that is not finite is null."""
    check_same_job(job, output, "train")
    file = output / RESULTS_FILE
    try:
        trials = json.loads(file.read_text(encoding="utf-8"))["trials"] if file.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot resume {output}: {file} holds no trials ({type(error).__name__}: {error})") from None
    say(f"resuming after {len(trials)} trials")
    return [{key: math.inf if value is None else value for key, value in trial.items()} for trial in trials]


def _places(job: Job, examples: Examples, names: list[str]) -> tuple[int, dict[str, Place]]:
    """FLoRA's number of adapter parameters, and for every other adapter where it acts and at which rank."""
    base = load_base(job.task, job.model, examples.labels)
    model = attach(job, shared(base), allocation="uniform")  # a budget is met without data too
    check_two_rates(job, model)
    goal = count_parameters(model)["adapter"]
    layers = adapted(model.get_base_model())
    fields = task_fields(job, base)
    places = {}
    for name in names:
        variants = attaches(name, **fields)
        able, left_out = adaptable(variants[0], base, layers)
        if not able:
            raise ValueError(f"{LABELS[name]} can adapt none of the {len(layers)} layers: {left_out}")
        places[name] = Place(fitting(variants, base, able, goal), able, left_out)
    return goal, places


def _search(comparison: Comparison, method: str, rates: Sequence[float] | None, say: Say) -> float:
    """The rate with the best score on the validation split, with the first seed."""

    def score(rate: float) -> float:
        return comparison.score(_trial(comparison, method, rate, comparison.seeds[0], say))

    if rates is None:
        return climb(comparison.job.train["learning_rate"], score)
    return max(rates, key=score)


def _check_adapter(comparison: Comparison, rate: float, say: Say) -> None:
    """Trains FLoRA once more if the adapter in the output is of another rate, or seed, that an earlier run chose."""
    file, seed = Path(comparison.job.output) / "adapter" / JOB_FILE, comparison.seeds[0]
    train = load_job(file).train if file.is_file() else {}
    if (train.get("learning_rate"), train.get("seed")) == (rate, seed):
        return
    wanted = ("flora", rate, seed)
    comparison.trials = [t for t in comparison.trials if (t["method"], t["rate"], t["seed"]) != wanted]
    comparison.rates = [rate]
    _trial(comparison, "flora", rate, seed, say)


def _trial(comparison: Comparison, method: str, rate: float, seed: int, say: Say) -> dict[str, Any]:
    """A trial that was done before, or else a new one, which is kept in the results file."""
    for done in comparison.trials:
        if (done["method"], done["rate"], done["seed"]) == (method, rate, seed):
            return done
    name = f"{LABELS[method]}, rate {rate:g}, seed {seed}"
    callbacks = [comparison.track(name)] if comparison.track else []
    trial = _train(comparison, method, rate, seed, callbacks)
    comparison.trials.append(trial)
    write_json(Path(comparison.job.output) / RESULTS_FILE, {"trials": comparison.trials})
    say(f"{name}: validation {comparison.metric} {trial[f'validation_{comparison.metric}']:.4g}")
    return trial


def _train(comparison: Comparison, method: str, rate: float, seed: int, callbacks: list) -> dict[str, Any]:
    """One training from the base model on, measured on the validation and the test split."""
    examples, metric = comparison.examples, comparison.metric
    job = copy.deepcopy(comparison.job)
    job.train |= {"learning_rate": rate, "seed": seed}
    scratch = copy.deepcopy(job)
    scratch.train |= _TRAIN
    arguments = training_arguments(scratch)
    transformers.set_seed(seed)  # the same new head for every method
    base = load_base(job.task, job.model, examples.labels)
    heads = trained_whole(job, base)
    head = sum(parameter.numel() for name in heads for parameter in base.get_submodule(name).parameters())
    network = sum(parameter.numel() for parameter in base.parameters()) - head
    collator = load_collator(job, base)
    started = time.perf_counter()
    with muted("florapeft"):  # which ranks are capped was said when FLoRA's number was counted
        if method == "flora":
            model, _ = attach_adapter(scratch, base, collator, examples, arguments, callbacks)
        else:
            epochs = warmup_epochs(job) if job.gradient_batches else 0
            warm_heads(base, heads, epochs, arguments, trainer_of_heads(scratch, collator, examples, callbacks))
            model = _attach_other(comparison, method, base)
            if method == "head":  # which is all that it trains, at the rates that it is tried with
                scratch.head_learning_rate = None
        trainer = make_trainer(scratch, model, collator, examples, arguments, callbacks, quiet=True)
        trainer.train()
    trial = {
        "method": method,
        "rate": rate,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "parameters": trainable(model) - head,
        "head_parameters": head,
        "network_parameters": network,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        f"validation_{metric}": evaluate(trainer)[metric],
        metric: evaluate(trainer, _test_rows(job, examples))[metric],
    }
    if method == "flora" and seed == comparison.seeds[0]:
        earlier = [t for t in comparison.trials if (t["method"], t["seed"]) == (method, seed)]
        rivals = [t for t in earlier if comparison.rates is None or t["rate"] in comparison.rates]
        if all(comparison.score(trial) > comparison.score(t) for t in rivals):
            with atomic_folder(Path(job.output) / "adapter", replace=True) as folder:
                model.save_pretrained(folder)
                (folder / JOB_FILE).write_text(job.to_yaml(), encoding="utf-8")
    return trial


def _attach_other(comparison: Comparison, method: str, base: transformers.PreTrainedModel) -> nn.Module:
    """The base model with just that trainable which `method` trains."""
    if method in comparison.places:
        place = comparison.places[method]
        return place.fit.attach(base, place.layers, place.fit.rank, place.fit.raised)
    base.requires_grad_(method == "full")
    for name in trained_whole(comparison.job, base):
        base.get_submodule(name).requires_grad_(True)
    return base


def _test_rows(job: Job, examples: Examples) -> Any:
    rows = examples.splits["test"]
    return with_images(job, rows) if job.task == "image-classification" else rows


def _summary(comparison: Comparison, chosen: dict[str, float]) -> dict[str, Any]:
    """What the results file says in the end: the built-in job's form, the differences, and every trial."""
    metric, methods, figures = comparison.metric, [], {}
    for method, rate in chosen.items():
        own = [trial for trial in comparison.trials if trial["method"] == method]
        runs = [trial for trial in own if trial["rate"] == rate and trial["seed"] in comparison.seeds]
        values = [trial[metric] for trial in runs]
        figures[method] = {trial["seed"]: trial[metric] for trial in runs}
        row = {
            "method": method,
            "label": LABELS[method],
            f"{metric}_mean": statistics.mean(values),
            f"{metric}_std": spread(values),
            "rate": rate,
            "rates": sorted({trial["rate"] for trial in own}),
            "seconds_mean": statistics.mean(trial["seconds"] for trial in runs),
            "share_of_network": runs[0]["parameters"] / runs[0]["network_parameters"],
            **{key: runs[0][key] for key in ("parameters", "head_parameters", "bytes")},
            "runs": runs,
        }
        if method != "flora":
            row["difference"] = difference(figures[method], figures["flora"])._asdict()
        if method in comparison.places:
            place = comparison.places[method]
            row |= {"rank": place.fit.rank, "one_more_in": len(place.fit.raised), "layers": len(place.layers)}
            row |= {"left_out": place.left_out, "is_equal": abs(runs[0]["parameters"] / comparison.goal - 1) <= WITHIN}
        methods.append(row)
    job = comparison.job
    return {
        "description": f"{Path(job.model).name} on {_data_name(job)}, {metric} on the test split",
        "task": job.task,
        "model": job.model,
        "metric": metric,
        "examples": {role: len(rows) for role, rows in comparison.examples.splits.items()},
        "seeds": comparison.seeds,
        "settings": {key: getattr(job, key) for key in ("train", "adapter", "gradient_batches", "head_learning_rate")},
        "methods": methods,
        "adapter": str(Path(job.output) / "adapter"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "trials": comparison.trials,
    }


def _data_name(job: Job) -> str:
    path = job.data.path if isinstance(job.data.path, str) else job.data.path["train"]
    return " ".join(filter(None, (Path(path).name, job.data.subset)))
