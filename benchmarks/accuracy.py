"""Does FLoRA adapt better? Methods at equal trainable parameters on real networks and data.

Every method begins with the same head, trained alone for one epoch, and takes its learning rates, of the adapter and of
the head, from the same grid, by its score on the validation split; the test split is measured at those rates, over all
seeds.

    python benchmarks/accuracy.py cifar100                  # one task; goes on where it was stopped
    python benchmarks/accuracy.py cola --seeds 3            # fewer seeds; more of them can be added later
    python benchmarks/accuracy.py cifar100 --fine           # the adapters' rates on a grid twice as fine, at the end
    python benchmarks/accuracy.py cifar100 --shares 0.025 0.05   # two budgets more
    python benchmarks/accuracy.py cifar100 --epochs 12      # longer training, in a record of its own
    python benchmarks/accuracy.py --device cuda             # larger sizes, in records of their own
    python benchmarks/accuracy.py --smoke                   # all tasks, cut short; nothing is written
"""

from __future__ import annotations

import argparse
import fcntl
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import adalora
import gradient_lora
import pretrained
import record
import tasks
import torch
from cases import SETTINGS, Case, available, fit, prepare
from compared import RECIPE, WITHOUT_BUDGET
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import nn

from florapeft import allocate, initialize_from_gradients, keep_orthonormal
from florapeft.gradients import are_noise
from florapeft.train.fitting import RIVALS, Fit, adaptable, attaches, exactly, fitting
from florapeft.train.trials import STEPS, climb, difference, rate_at, spread


class Rates(NamedTuple):
    """Learning rates: of the adapter, or of what else is trained of the network, and of a new head."""

    body: float | None
    head: float | None


class Plan(NamedTuple):
    """How many seeds are run: at the rates that are chosen, in the search for them, and at other budgets.

    With `fine`, the adapter's rate is searched once more, among its neighbours on a grid twice as fine.
    """

    seeds: int = 5
    search_seeds: int = 2
    other_shares: tuple[float, ...] = ()
    other_seeds: int = 2
    fine: bool = False


class NothingToTrainError(Exception):
    """A method that has no place on a task's network; the message says why."""


# Each takes a case, the network with its warm head, and the seed; returns the network with what is trained, and facts.
Method = Callable[[Case, nn.Module, int], tuple[nn.Module, dict[str, Any]]]


def head_only(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.in_head(name))
    return model, {}


def bitfit(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or case.in_head(name))
    return model, {}


def full(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    return model.requires_grad_(True), {}


class Fitted(NamedTuple):
    """A method of PEFT at `Case.goal` parameters, on those of the layers that it can adapt."""

    fit: Fit
    layers: list[str]
    facts: dict[str, Any]


def fitted(name: str, case: Case, model: nn.Module) -> Fitted:
    if name not in case.fits:
        with torch.random.fork_rng(devices=[]):  # a run is the same whether it is the first to ask or not
            case.fits[name] = _fitted(name, case, model)
    return case.fits[name]


def _fitted(name: str, case: Case, model: nn.Module) -> Fitted:
    variants = attaches(name, modules_to_save=case.trained_along)
    layers, left_out = adaptable(variants[0], model, case.layers)
    if not layers:
        raise NothingToTrainError("; ".join(left_out.values()))
    fit = fitting(variants, model, layers, case.goal)
    facts = {"rank": fit.rank, "one_more_in": len(fit.raised), **({"left_out": left_out} if left_out else {})}
    return Fitted(fit, layers, facts)


def rival(name: str, case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A method of PEFT at its own start."""
    fit, layers, facts = fitted(name, case, model)
    return fit.attach(model, layers, fit.rank, fit.raised), facts


def adalora_rival(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """AdaLoRA, whose parameters are those that remain in the end."""
    refused = adalora.refused(model, case.layers)
    layers = [name for name in case.layers if name not in refused]
    if not layers:
        raise NothingToTrainError("; ".join(sorted(set(refused.values()))))
    model = adalora.attach(model, layers, case.goal, case.steps, modules_to_save=case.trained_along)
    return model, {"left_out": refused} if refused else {}


def gradient_rival(
    spectrum: bool, case: Case, model: nn.Module, seed: int, *, orthonormal: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """LoRA with a start, and maybe with ranks, from gradients; as with FLoRA, those that are noise are not followed.

    With `orthonormal` the rows of A, which begin so, stay so in training.
    """
    layers = fitted("lora", case, model).layers
    found, agreement = gradient_lora.gradients(model, layers, case.batches(seed), case.loss)
    noise = are_noise(agreement)
    if spectrum and not noise:
        ranks = gradient_lora.spectrum_ranks(found, case.goal)
        model, facts = gradient_lora.attach_with(model, ranks, modules_to_save=case.trained_along), {"ranks": ranks}
    else:
        model, facts = rival("lora", case, model, seed)
    if not noise:
        gradient_lora.start_from_gradients(model, found)
    return model, facts | {"agreement": agreement, "orthonormal": orthonormal and not noise}


def loraga(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """PEFT's own LoRA with a start from gradients, LoRA-GA (Wang et al., 2024), at PEFT's settings."""
    fit, layers, facts = fitted("lora", case, model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if others := [name for name in layers if name not in linear]:
        raise NothingToTrainError(f"LoRA-GA takes linear layers alone, not {others[0]}")

    def passes() -> None:
        for batch in case.batches(seed):
            case.loss(model, batch).backward()

    fields = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    with warnings.catch_warnings():  # its hook counts passes, and needs no gradient of a first layer's input
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        preprocess_loraga(model, LoraConfig(target_modules=exactly(layers), **fields), passes)
    (attach,) = attaches("lora", modules_to_save=case.trained_along, **fields)
    return attach(model, layers, fit.rank, fit.raised), facts


def flora(
    fields: dict[str, Any], case: Case, model: nn.Module, seed: int, *, orthonormal: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """FLoRA; fields of its config, and `allocation="spectrum"`, which takes the ranks from gradients.

    As in `flora train`, gradients that are noise are not followed. With `orthonormal` factors stay so in training.
    """
    config = case.config(**fields)
    if config.allocation == "spectrum":
        config = allocate(model, config, case.batches(seed), case.loss)
        agreement = {"agreement": config.gradient_agreement}
        if are_noise(config.gradient_agreement):
            model, facts = flora({}, case, model, seed)
            return model, facts | agreement
        return get_peft_model(model, config), {"ranks": config.ranks, "orthonormal": orthonormal} | agreement
    model = get_peft_model(model, config)
    if config.init_weights == "gradient":
        initialize_from_gradients(model, case.batches(seed), case.loss)
    return model, {"ranks": model.peft_config["default"].ranks}


_GRADIENTS = {"init_weights": "gradient", "allocation": "spectrum"}


def keeper(method: str) -> Callable[[nn.Module, torch.optim.Optimizer], Any]:
    """What keeps a method's factors orthonormal."""
    return keep_orthonormal if method.startswith("FLoRA") else gradient_lora.keep_orthonormal


METHODS: dict[str, Method] = {
    "head only": head_only,
    "BitFit": bitfit,
    "full fine-tuning": full,
    **{said.label: partial(rival, name) for name, said in RIVALS.items()},
    "AdaLoRA": adalora_rival,
    "LoRA-GA": loraga,
    "LoRA, gradient start": partial(gradient_rival, False),
    "LoRA, gradient start, ranks by spectrum": partial(gradient_rival, True),
    "LoRA, gradient start, ranks by spectrum, orthonormal": partial(gradient_rival, True, orthonormal=True),
    "FLoRA, released start": partial(flora, {"init_weights": "released", "kernel_r": 2, "scale": 4.0}),
    "FLoRA": partial(flora, {}),
    "FLoRA, gradient start": partial(flora, {"init_weights": "gradient"}),
    "FLoRA, gradient start, ranks by spectrum": partial(flora, _GRADIENTS),
    RECIPE: partial(flora, _GRADIENTS, orthonormal=True),
}


def train(case: Case, method: str, rates: Rates, seed: int) -> dict[str, Any]:
    """One run, from the warm head to the scores on the validation and the test split."""
    task, setting = case.task, case.setting
    model = case.model(seed)
    torch.manual_seed(seed)
    began = case.seconds()
    model, facts = METHODS[method](case, model, seed)
    started = case.seconds()
    head = [p for n, p in model.named_parameters() if p.requires_grad and case.in_head(n)]
    body = [p for n, p in model.named_parameters() if p.requires_grad and not case.in_head(n)]
    if not head + body:
        raise NothingToTrainError("the network has no such parameters")
    groups = [(rates.body, body), (rates.head, head)]
    keep = keeper(method) if facts.get("orthonormal") else None
    loss = fit(case, model, groups, setting.epochs, seed, adalora.after_steps(model), keep)
    seconds = case.seconds() - started
    return {
        "commit": record.commit(),
        "method": method,
        "share": setting.share,
        "rate": rates.body,
        "head_rate": rates.head,
        "seed": seed,
        "validation": case.score(model, task.validation),
        "test": case.score(model, task.test),
        "further": case.further(model),
        "final_loss": loss if math.isfinite(loss) else None,
        "parameters": adalora.kept_parameters(model) if adalora.is_adalora(model) else sum(p.numel() for p in body),
        "start_seconds": round(started - began, 2),
        "seconds": round(seconds, 2),
        **facts,
    }


def compare(case: Case, methods: list[str], plan: Plan, path: Path) -> None:
    """Searches rates per method, then runs the other seeds at them; every finished run is kept in `path`.

    Several processes, each with methods of its own, may work on one file.
    """
    examples = {part: len(getattr(case.task, part)["labels"]) for part in ("train", "validation", "test")}
    same = {"setting": asdict(case.setting), "examples": examples}
    with changing(path) as results:
        _check_same(path, results, same)
        results |= {"task": case.name, "score": case.task.score_name, **same}
        results |= {"goal": case.goal, "layers": len(case.layers), **case.task.facts()}
        runs = results.setdefault("runs", [])

    def run(case: Case, method: str, rates: Rates, seed: int) -> dict[str, Any]:
        for done in runs:
            if _which(done) == (method, case.setting.share, rates, seed):
                return done
        runs.append(train(case, method, rates, seed))
        print(case.name, {key: value for key, value in runs[-1].items() if key != "ranks"}, flush=True)
        with changing(path) as results:
            results["runs"].append(runs[-1])
        return runs[-1]

    def score(case: Case, method: str, seeds: int, rates: Rates) -> float:
        return statistics.mean(run(case, method, rates, seed)["validation"] for seed in range(seeds))

    def measured(method: str) -> Rates:
        rates = search(case, method, partial(score, case, method, plan.search_seeds), plan.fine)
        for seed in range(plan.seeds):
            run(case, method, rates, seed)
        return rates

    def measured_at(share: float, method: str, rates: Rates) -> Rates:
        """At another budget the adapter's rate is searched anew, from that of the first."""
        score_there = partial(score, case.at(share), method, plan.other_seeds)
        rates = search_body(rates, score_there)
        return search_finer(rates, score_there) if plan.fine else rates

    for method in methods:
        try:
            rates = measured(method)
        except NothingToTrainError as reason:
            with changing(path) as results:
                results.setdefault("left_out", {})[method] = str(reason)
            continue
        with changing(path) as results:
            results.get("left_out", {}).pop(method, None)
            results.setdefault("rates", {})[method] = rates._asdict()
            results.setdefault("search_seeds", {})[method] = plan.search_seeds
            if plan.fine:
                results["fine"] = sorted({method, *results.get("fine", [])})
            results["methods"] = summary(results, case.setting.share, results["rates"])
        for share in () if method in WITHOUT_BUDGET else plan.other_shares:
            there = measured_at(share, method, rates)
            with changing(path) as results:
                known = results.setdefault("rates_at", {}).setdefault(str(share), {})
                known[method] = there._asdict()
                if plan.fine:
                    refined = results.setdefault("fine_at", {})
                    refined[str(share)] = sorted({method, *refined.get(str(share), [])})
                results.setdefault("other_budgets", {})[str(share)] = summary(results, share, known)


def _check_same(path: Path, results: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Runs of other settings are not gone on with."""
    for key, value in wanted.items():
        if results.get("runs") and results[key] != value:
            raise SystemExit(f"{path} was measured with {key} {results[key]}, now it is {value}: move the file away")


def search(case: Case, method: str, score: Callable[[Rates], float], fine: bool = False) -> Rates:
    """The rates with the best score: first the adapter's, with the head's where its search begins, then the head's.

    With `fine`, then the adapter's neighbours on a grid twice as fine.
    """
    rates = search_body(first_rates(case, method), score)
    if rates.head is not None:
        rates = rates._replace(head=climb(rates.head, lambda rate: score(rates._replace(head=rate))))
    return search_finer(rates, score) if fine else rates


def search_body(rates: Rates, score: Callable[[Rates], float], **how: int) -> Rates:
    """With the adapter's best rate, if there is one."""
    if rates.body is None:
        return rates
    return rates._replace(body=climb(rates.body, lambda rate: score(rates._replace(body=rate)), **how))


def search_finer(rates: Rates, score: Callable[[Rates], float]) -> Rates:
    """With the best of the adapter's rate and its neighbours on a grid twice as fine."""
    return search_body(rates, score, reach=1, steps=2 * STEPS)


def first_rates(case: Case, method: str) -> Rates:
    """Where the search for rates begins; None where there is nothing to train at it.

    For full fine-tuning a factor of ten lower on the same grid, as its rates are known to be.
    """
    body = rate_at(case.setting.rate, -STEPS) if method == "full fine-tuning" else case.setting.rate
    if method == "head only":
        body = None
    return Rates(body, None if case.task.head is None else case.setting.head_rate)


def _which(run: dict[str, Any]) -> tuple[str, float, Rates, int]:
    return run["method"], run["share"], Rates(run["rate"], run["head_rate"]), run["seed"]


@contextmanager
def changing(path: Path) -> Iterator[dict[str, Any]]:
    """The record at `path`, for this process alone, written at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = record.read(path)
        yield results
        record.write(path, results)


def summary(results: dict[str, Any], share: float, chosen_rates: dict[str, Any]) -> dict[str, Any]:
    """Per method at its rates: scores, their mean and deviation, and paired differences to `RECIPE`."""
    chosen = {}
    for method in METHODS:
        if rates := chosen_rates.get(method):
            wanted = (method, share, Rates(**rates))
            runs = [run for run in results["runs"] if _which(run)[:3] == wanted]
            if runs:
                chosen[method] = runs
    tests = {method: {run["seed"]: run["test"] for run in runs} for method, runs in chosen.items()}
    rows = {}
    for method, runs in chosen.items():
        scores = [run["test"] for run in runs]
        tried = [run for run in results["runs"] if (run["method"], run["share"]) == (method, share)]
        further = runs[0].get("further", {})
        rows[method] = {
            "rate": runs[0]["rate"],
            "head_rate": runs[0]["head_rate"],
            "rates_tried": sorted({run["rate"] for run in tried if run["rate"]}),
            "head_rates_tried": sorted({run["head_rate"] for run in tried if run["head_rate"]}),
            "tests": scores,
            "test_mean": statistics.mean(scores),
            "test_std": spread(scores),
            "validation_mean": statistics.mean(run["validation"] for run in runs),
            "further": {name: statistics.mean(run["further"][name] for run in runs) for name in further},
            "seeds": len(runs),
            "parameters": round(statistics.mean(run["parameters"] for run in runs)),
            "seconds": statistics.median(run["seconds"] for run in runs),
            "start_seconds": statistics.median(run["start_seconds"] for run in runs),
        }
        if RECIPE in tests and method != RECIPE:
            rows[method]["difference"] = difference(tests[method], tests[RECIPE])._asdict()
    return rows


def smoke(case: Case, methods: list[str]) -> None:
    """Every method once, on a network that is not pretrained where this repository would have to do it."""
    cut_short(case)
    pretrained.skipped = True
    for method in methods:
        try:
            train(case, method, first_rates(case, method), 0)
            print(case.name, method, "runs", flush=True)
        except NothingToTrainError as reason:
            print(case.name, method, f"is left out: {reason}", flush=True)


def cut_short(case: Case) -> None:
    """Leaves 64 examples of each split and one epoch of four steps."""
    parts = {part: tasks.batches(getattr(case.task, part), 64)[0] for part in ("train", "validation", "test")}
    case.task = replace(case.task, **parts)
    case.setting = replace(case.setting, epochs=1, batch_size=16, gradient_batches=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(SETTINGS)}; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="of the figures on the test split")
    parser.add_argument("--search-seeds", type=int, default=2, help="of the search for rates")
    parser.add_argument("--fine", action="store_true", help="search the adapters' rates once more on a finer grid")
    parser.add_argument("--shares", type=float, nargs="+", default=(), help="further budgets")
    parser.add_argument("--other-seeds", type=int, default=2, help="at the further budgets")
    parser.add_argument("--epochs", type=int, help="instead of the task's own; kept in a record apart")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="on a GPU all tasks have a larger size"
    )
    parser.add_argument("--smoke", action="store_true", help="64 examples, one epoch, one seed; nothing is written")
    given = parser.parse_args(arguments)
    if unknown := set(given.tasks) - set(SETTINGS):
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    prepare(given.threads)
    for case in available(given.tasks or SETTINGS, given.data, given.device):
        if given.smoke:
            smoke(case, given.methods)
            continue
        name = f"accuracy_{case.name}{'' if given.device == 'cpu' else '_gpu'}{case.train_for(given.epochs)}"
        plan = Plan(given.seeds, given.search_seeds, tuple(given.shares), given.other_seeds, given.fine)
        compare(case, given.methods, plan, record.RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
