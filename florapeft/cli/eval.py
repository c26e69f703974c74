"""`flora eval`: how good a saved adapter is on a data set."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from florapeft.cli._output import DebugFlag, JsonFlag, reporting, split_arguments


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or the output of a run.", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...",
            help="A job file that says task, model and data, and changes to it; by default the adapter's own.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, validation or test; by default test, else validation.")
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure a saved adapter on a data set.

    \b
    Examples:
      flora eval runs/digits
      flora eval runs/my-job --split validation
      flora eval runs/my-job/adapter job.yaml data.path=new.csv data.splits.test=train
    """
    config, overrides = split_arguments(arguments)
    if split not in (None, "train", "validation", "test"):
        raise typer.BadParameter(f"'{split}' is not train, validation or test", param_hint="--split")
    with reporting(as_json, debug) as output:
        from florapeft.train.evaluate import evaluate_adapter

        callbacks = [output.progress("evaluation")]
        record = evaluate_adapter(adapter, config, overrides, split=split, say=output.say, callbacks=callbacks)
        output.result(record, _show)


def _show(console: Console, record: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in record.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
