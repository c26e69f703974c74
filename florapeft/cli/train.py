"""`flora train`: a job file's fine-tuning, or the built-in job."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from florapeft.cli._output import DebugFlag, JsonFlag, OverwriteFlag, reporting, split_arguments


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...", help="A job file, and changes to it.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this job.")] = False,
    overwrite: OverwriteFlag = False,
    results: Annotated[Path | None, typer.Option("--results", help="Also write the results to this JSON file.")] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Fine-tune a model with FLoRA; without a job file, the built-in job on real data.

    \b
    Examples:
      flora train
      flora train seeds=[0] output=runs/quick
      flora train examples/image-classification.yaml
      flora train job.yaml train.learning_rate=1e-3 adapter.r=16
      flora train job.yaml --resume
      torchrun --nproc_per_node 2 -m florapeft.cli train job.yaml
    """
    config, overrides = split_arguments(arguments)
    with reporting(as_json, debug) as output:
        if results is not None and results.exists() and not overwrite:
            raise FileExistsError(f"results file {results} exists; it is not overwritten unless --overwrite is given")
        if config is None:
            from florapeft.train.comparison import run_builtin

            if resume:
                raise ValueError("--resume needs a job file: the built-in job is short and starts over")
            record = run_builtin(overrides, overwrite=overwrite, say=output.say, track=output.progress)
        else:
            from florapeft.train import load_job, run_job
            from florapeft.train.run import leave_other_processes

            job = load_job(config, overrides)
            callbacks = [output.progress("training")]
            record = run_job(job, resume=resume, overwrite=overwrite, say=output.say, callbacks=callbacks)
            leave_other_processes()
        if results is not None:
            from florapeft.train.save import write_json

            write_json(results, record)
        output.result(record, _show_builtin if config is None else _show_job)
        if config is None and not record["reload"]["equal"]:
            raise ValueError("the adapter, reloaded from disk, is not as accurate as it was; see results.json")


def _show_job(console: Console, record: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    parameters = record["parameters"]
    table.add_row("steps", str(record["steps"]))
    table.add_row("time", f"{record['seconds']:.0f} s")
    if record["train_loss"] is not None:
        table.add_row("training loss", f"{record['train_loss']:.4g}")
    for name, value in record["validation"].items():
        table.add_row(f"validation {name}", f"{value:.4g}")
    share = parameters["adapter"] / parameters["network"]
    table.add_row("adapter", f"{parameters['adapter']:,} parameters, {share:.2%} of the network's")
    if parameters["head"]:
        table.add_row("trained in full", f"{parameters['head']:,} parameters")
    console.print(table)
    console.print(f" saved to {record['adapter']}", soft_wrap=True)


def _show_builtin(console: Console, record: dict[str, Any]) -> None:
    title = f"{record['description']}; mean ± standard deviation over {len(record['seeds'])} seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    table.add_column("method", overflow="fold")  # nothing is cut on a narrow screen or in a pipe
    for column in ("accuracy", "parameters", "share", "new head", "seconds", "size"):
        table.add_column(column, justify="right", overflow="fold")
    for method in record["methods"]:
        table.add_row(
            method["label"],
            f"{method['accuracy_mean']:.1%} ± {method['accuracy_std']:.1%}",
            f"{method['parameters']:,}",
            f"{method['share_of_network']:.1%}",
            f"{method['head_parameters']:,}",
            f"{method['seconds_mean']:.1f}",
            f"{method['bytes'] / 1000:.0f} kB",
        )
    console.print(table)
    gap = record["gap_closed"]
    closed = "not defined (no gap)" if gap is None else f"{gap:.0%}"
    console.print(f"FLoRA closes this share of the gap from new head to full fine-tuning: {closed}")
    reload = record["reload"]
    console.print(f"Adapter: {record['adapter']}", soft_wrap=True)
    before, after = reload["accuracy_before"], reload["accuracy"]
    word = "equal" if reload["equal"] else "NOT EQUAL"
    console.print(
        f"Its accuracy: {before:.2%}; reloaded from disk into a fresh base: {after:.2%} ({word})", soft_wrap=True
    )
