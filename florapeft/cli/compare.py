"""`flora compare`: the same job with FLoRA and with other methods, at equal trainable parameters."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from florapeft.cli._adapter import parse_names
from florapeft.cli._output import DebugFlag, JsonFlag, OverwriteFlag, reporting, split_arguments


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.yaml [key=value]...", help="A job file, and changes to it.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the comparison; by default OUTPUT-compare.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Beside FLoRA: of lora, rslora, dora, loha, lokr, head, full.")
    ] = "lora,dora,loha,lokr,full",
    seeds: Annotated[str, typer.Option("--seeds", help="Whole numbers with commas between them.")] = "0,1,2",
    rates: Annotated[
        str | None,
        typer.Option("--rates", help="Learning rates to choose from; by default a walk from the job's own."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials that are missing.")] = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare FLoRA with other methods on a job, each at its own learning rate; the data need a test split.

    \b
    Examples:
      flora compare job.yaml
      flora compare job.yaml adapter.budget=0.01 --seeds 0,1,2,3,4 -o runs/compared
      flora compare job.yaml --methods lora,full --rates 3e-4,1e-3,3e-3
      flora compare job.yaml --resume
    """
    config, overrides = split_arguments(arguments)
    if config is None:
        raise typer.BadParameter("a job file is needed first", param_hint="CONFIG.yaml")
    chosen_seeds = _numbers(seeds, int, "--seeds")
    chosen_rates = None if rates is None else _numbers(rates, float, "--rates")
    with reporting(as_json, debug) as shown:
        from florapeft.train import load_job
        from florapeft.train.compare import run_comparison

        job = load_job(config, overrides)
        job.output = f"{job.output}-compare" if output is None else str(output)
        record = run_comparison(
            job,
            parse_names(methods),
            chosen_seeds,
            chosen_rates,
            resume=resume,
            overwrite=overwrite,
            say=shown.say,
            track=shown.progress,
        )
        shown.result(record, _show)


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        word = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"'{text}' is not {word} with commas between them", param_hint=option) from None


def _show(console: Console, record: dict[str, Any]) -> None:
    metric = record["metric"]
    percent = metric == "accuracy"
    title = f"{record['description']}; mean ± standard deviation over {len(record['seeds'])} seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    table.add_column("method", overflow="fold")  # nothing is cut on a narrow screen or in a pipe
    for column in (metric, "against FLoRA, 95%", "rate", "parameters", "share", "seconds"):
        table.add_column(column, justify="right", overflow="fold")
    for row in record["methods"]:
        mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
        table.add_row(
            row["label"],
            f"{mean:.1%} ± {std:.1%}" if percent else f"{mean:.4g} ± {std:.2g}",
            _shown(row.get("difference"), percent),
            f"{row['rate']:g}",
            f"{row['parameters']:,}",
            f"{row['share_of_network']:.2%}",
            f"{row['seconds_mean']:.1f}",
        )
    console.print(table)
    for row in record["methods"]:
        if row.get("is_equal") is False:
            console.print(f"{row['label']}: this number of parameters is the nearest to FLoRA's that it has")
        for kind, why in row.get("left_out", {}).items():
            console.print(f"{row['label']} leaves out {kind}: {why}", soft_wrap=True)
    console.print(f"FLoRA's adapter: {record['adapter']}", soft_wrap=True)


def _shown(difference: dict[str, float | None] | None, percent: bool) -> str:
    if difference is None:
        return ""
    mean, low, high = (value if value is None or not percent else 100 * value for value in difference.values())
    return f"{mean:+.2f}" if low is None else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
