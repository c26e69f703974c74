"""The `flora` command in the tests' own process."""

from typer.testing import CliRunner

from florapeft.cli._app import app


def flora(*arguments, code=0):
    """Runs the command; returns what it printed to stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout, result.stderr
