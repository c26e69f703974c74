"""`flora plan`: what an adapter of a model would be, from the model's config alone."""

from typing import Annotated, Any

import typer
from rich.console import Console

from florapeft.cli._adapter import KernelRank, Targets, parse_budget, parse_targets
from florapeft.cli._output import DebugFlag, JsonFlag, reporting


def plan(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model; only its config is read.")],
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Adapter parameters: a count, or a share of the model's such as 0.5%."),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of every channel mode, where there is no budget.")] = None,
    kernel_r: KernelRank = None,
    targets: Targets = "all-weights",
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show which weights would be adapted, at which ranks, and what that costs; no weights are loaded.

    \b
    Examples:
      flora plan facebook/convnextv2-base-22k-224 --budget 0.5%
      flora plan ./my-model --r 16 --targets q_proj,v_proj --json
    """
    share, names = None if budget is None else parse_budget(budget), parse_targets(targets)
    with reporting(as_json, debug) as output:
        from florapeft import FloraConfig
        from florapeft.planning import plan as plan_adapter
        from florapeft.train.model import load_skeleton

        ranks: dict[str, Any] = {"budget": share, "kernel_r": kernel_r}
        if r is not None:
            ranks["r"] = r
        config = FloraConfig(target_modules=names, **ranks)
        found = plan_adapter(load_skeleton(model), config)
        output.result(found.to_dict(), lambda console, _: _show(console, str(found)))


def _show(console: Console, table: str) -> None:
    console.print(table, soft_wrap=True)
