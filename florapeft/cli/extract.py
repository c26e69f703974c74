"""`flora extract`: an adapter from a fine-tuned checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from florapeft.cli._adapter import KernelRank, Targets, parse_budget, parse_names, parse_targets
from florapeft.cli._output import DebugFlag, JsonFlag, OverwriteFlag, reporting


def extract(
    base: Annotated[str, typer.Argument(help="Hub id or folder of the model before fine-tuning.", show_default=False)],
    tuned: Annotated[str, typer.Argument(help="Hub id or folder of the model after it.", show_default=False)],
    adapter: Annotated[
        Path, typer.Option("-o", "--output", metavar="ADAPTER", help="Folder to write.", show_default=False)
    ],
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Adapter parameters: a count, or a share of the model's.  [default: 5%]"),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of every channel mode, in place of a budget.")] = None,
    kernel_r: KernelRank = None,
    targets: Targets = "all-weights",
    keep: Annotated[
        str | None,
        typer.Option("--keep", help="Modules to keep in full, with commas between them.  [default: the classifier]"),
    ] = None,
    bias: Annotated[str, typer.Option("--bias", help="Biases to keep: none, all or flora_only.")] = "none",
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, such as cuda.")] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the adapter that comes nearest to what fine-tuning changed; models are read one weight at a time.

    A run that was interrupted goes on where it stopped when it is started again.

    \b
    Examples:
      flora extract facebook/convnextv2-base-22k-224 ./my-finetuned -o adapter --budget 10%
      flora extract ./base ./tuned -o adapter --r 16 --bias all
    """
    if budget is not None and r is not None:
        raise typer.BadParameter("--budget and --r exclude each other")
    fields: dict[str, Any] = {"kernel_r": kernel_r, "bias": bias}
    fields |= {"budget": parse_budget(budget or "5%")} if r is None else {"r": r}
    fields["target_modules"] = parse_targets(targets)
    if keep is not None:
        fields["modules_to_save"] = parse_names(keep) or None
    with reporting(as_json, debug) as output:
        from florapeft.train.extract import extract_adapter

        check_is_model(tuned)
        record = extract_adapter(
            base,
            tuned,
            adapter,
            fields,
            device=device,
            overwrite=overwrite,
            say=output.say,
            progress=output.stages(),
        )
        table = record.pop("table")
        output.result(record, lambda console, _: _show(console, record, table))


def check_is_model(tuned: str) -> None:
    """A folder that is no whole model is refused before anything is read; a hub id is looked up later."""
    folder = Path(tuned).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{tuned} is an adapter; a full fine-tuned model is needed (flora merge makes one of it)")
    raise ValueError(f"{tuned} has no config.json; a folder with a full fine-tuned model is needed")


def _show(console: Console, record: dict[str, Any], table: str) -> None:
    console.print(table, soft_wrap=True)
    console.print(f"adapter: {record['output']}", soft_wrap=True)
