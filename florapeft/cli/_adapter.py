"""What commands that choose an adapter's ranks and targets have in common."""

from typing import Annotated

import typer

KernelRank = Annotated[int | None, typer.Option("--kernel-r", help="Rank of every kernel mode.")]
Targets = Annotated[str, typer.Option("--targets", help="all-weights, all-linear, or names with commas between them.")]


def parse_names(text: str) -> list[str]:
    """`"lora, full,"` → `["lora", "full"]`."""
    return [name for part in text.split(",") if (name := part.strip())]


def parse_targets(text: str) -> str | list[str]:
    """`"q_proj, v_proj"` → the list of names; PEFT's and our own words for many stay as they are."""
    names = parse_names(text)
    if not names:
        raise typer.BadParameter("no name is given", param_hint="--targets")
    return names[0] if names in (["all-weights"], ["all-linear"]) else names


def parse_budget(text: str) -> int | float:
    """`"0.5%"` and `"0.005"` → 0.005; `"20000"` and `"20_000"` → 20000."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' is neither a count nor a share such as 0.5%", param_hint="--budget"
        ) from None
