"""The `flora` command. Each subcommand is one file; each imports what it needs only when it runs."""

import sys

# Module that is missing → the extra that brings it.
_EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "yaml": "cli",
    "transformers": "train",
    "accelerate": "train",
    "datasets": "train",
    "sklearn": "train",
    "PIL": "train",
    "tensorboard": "train",
    "jinja2": "report",
    "matplotlib": "report",
}


def main() -> None:
    """Runs the command line; exit codes: 0 done, 1 failed, 2 wrong usage."""
    try:
        from florapeft.cli._app import app
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    app()


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install where an optional dependency is missing; None where `error` is about something else."""
    module = (error.name or "").split(".")[0]
    if module not in _EXTRAS:
        return None
    return f'{module} is not installed; this needs: pip install "florapeft[{_EXTRAS[module]}]"'
