"""`flora report`: one HTML page about an adapter."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from florapeft.cli._output import DebugFlag, JsonFlag, OverwriteFlag, reporting


def report(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or the output of a run.", show_default=False)],
    page: Annotated[
        Path, typer.Option("-o", "--output", metavar="PAGE.html", help="File to write.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Folder, safetensors file or hub id of the base; by default the one the adapter names, if it is here.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Write the figures alone too, as PNG files.")
    ] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write a page that shows what an adapter changes: one HTML file that needs nothing but a browser.

    \b
    Examples:
      flora report runs/digits -o report.html
      flora report runs/my-job/adapter --base path/to/model -o report.html --png figures
    """
    with reporting(as_json, debug) as output:
        from florapeft.report import write_report

        record = write_report(adapter, page, base=base, png=png, overwrite=overwrite, say=output.say)
        output.result(record, _show)


def _show(console: Console, record: dict[str, Any]) -> None:
    for note in record["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"page: {record['report']} ({record['bytes'] / 1000:,.0f} kB)", soft_wrap=True)
    if "png" in record:
        console.print(f"figures: {record['png']}", soft_wrap=True)
