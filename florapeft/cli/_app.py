"""The subcommands put together."""

from typing import Annotated

import typer

from florapeft.cli.compare import compare
from florapeft.cli.eval import evaluate
from florapeft.cli.extract import extract
from florapeft.cli.merge import merge
from florapeft.cli.plan import plan
from florapeft.cli.report import report
from florapeft.cli.train import train

app = typer.Typer(
    name="flora",
    help="FLoRA: fine-tune any weight tensor of a network with a few percent of its parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # examples keep their line breaks
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("merge")(merge)
app.command("plan")(plan)
app.command("report")(report)
app.command("extract")(extract)
app.command("compare")(compare)


def _version(asked: bool) -> None:
    if asked:
        from florapeft import __version__

        typer.echo(f"florapeft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """FLoRA: fine-tune any weight tensor of a network with a few percent of its parameters."""
