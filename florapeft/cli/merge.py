"""`flora merge`: the base model with an adapter's update merged in, in the base's own format."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from florapeft.cli._output import DebugFlag, JsonFlag, OverwriteFlag, reporting


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or the output of a run.", show_default=False)],
    model: Annotated[
        Path, typer.Option("-o", "--output", metavar="MODEL", help="Folder to write.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Hub id or folder of the base; by default the one the adapter names.")
    ] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the base model with the update merged in; it needs neither PEFT nor florapeft to be used.

    The result is read back and compared with base plus adapter on a random input before it is put in place.

    \b
    Example:
      flora merge runs/my-job -o merged-model
    """
    with reporting(as_json, debug) as output:
        from florapeft.train.merge import merge_adapter

        record = merge_adapter(adapter, model, base=base, overwrite=overwrite, say=output.say)
        output.result(record, _show)


def _show(console: Console, record: dict[str, Any]) -> None:
    console.print(f"merged model: {record['output']}", soft_wrap=True)
    if record["preprocessing"]:
        console.print(f"with the base's {', '.join(record['preprocessing'])}", soft_wrap=True)
    console.print(
        f"read back: equal; to base plus adapter within {record['relative_difference']:.1e} of the largest output"
    )
