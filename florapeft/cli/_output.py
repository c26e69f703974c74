"""What every subcommand shares: stages and progress on stderr, results on stdout, errors in one line."""

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from florapeft.cli import missing_extra

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show warnings of libraries, and the traceback of an error.")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]

_NOISY = ("transformers", "datasets", "torch", "accelerate", "peft", "huggingface_hub", "multiprocess", "tensorboard")


def rank() -> int:
    """This process's number under torchrun or accelerate launch, else 0."""
    return int(os.environ.get("RANK", "0"))


class Output:
    """Where one command writes. Only the first process of a job writes anything but errors."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        plain = {"highlight": False, "markup": False, "emoji": False}  # a path may hold [/] or :a:
        self.stderr = Console(stderr=True, soft_wrap=True, **plain)
        self.stdout = Console(**plain)
        self.shown: list[Any] = []

    def say(self, text: str) -> None:
        """One line about what is going on."""
        if rank() == 0:
            self.stderr.print(text, style="dim")

    def progress(self, label: str) -> Any:
        """A Trainer callback that shows the steps of one training run."""
        from florapeft.cli._progress import StepProgress

        self.shown.append(StepProgress(self.stderr, label))
        return self.shown[-1]

    def stages(self) -> Any:
        """A function of stage, number done and number of all that shows how far a long computation is."""
        from florapeft.cli._progress import StageProgress

        self.shown.append(StageProgress(self.stderr))
        return self.shown[-1]

    def close(self) -> None:
        """Stops the bars that an error or Ctrl-C has left: while one is shown, a terminal has no cursor."""
        for progress in self.shown:
            progress.stop()

    def result(self, record: dict[str, Any], show: Callable[[Console, dict[str, Any]], None]) -> None:
        """The results: as JSON if asked, else by `show`."""
        from florapeft.train.save import to_json

        if rank() != 0:
            return
        if self.as_json:
            typer.echo(to_json(record))
        else:
            show(self.stdout, record)


@contextmanager
def reporting(as_json: bool, debug: bool) -> Iterator[Output]:
    """Yields the Output of a command; an exception inside becomes one line on stderr and exit code 1."""
    output = Output(as_json)
    try:
        with closing(output), warnings.catch_warnings(), _notes(output):
            if not debug:
                _calm(output)
            yield output
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        process = f" (process {rank()})" if rank() else ""
        typer.echo(f"error{process}: {one_line(error)}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _notes(output: Output) -> Iterator[None]:
    """Shows what florapeft logs as notes, each once: a command may attach the same adapter several times."""
    seen: set[str] = set()

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in seen:
                seen.add(text)
                output.say(f"note: {text}")

    handler = Notes(logging.WARNING)
    logging.getLogger("florapeft").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("florapeft").removeHandler(handler)


def one_line(error: Exception) -> str:
    """An error's message without line breaks; its type too where a message alone would not be understood."""
    if isinstance(error, ModuleNotFoundError) and (message := missing_extra(error)):
        return message
    text = " ".join(str(error).split())
    is_ours = isinstance(error, (ValueError, OSError, TypeError)) and text
    return text if is_ours else f"{type(error).__name__}: {text} (--debug shows where)"


def split_arguments(arguments: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """`[CONFIG.yaml] [key=value …]` → the file, if there is one, and the overrides."""
    arguments = list(arguments or [])
    config = None
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        config = Path(arguments.pop(0))
    for argument in arguments:
        if "=" not in argument:
            raise typer.BadParameter(
                f"'{argument}' is neither the first argument, a job file, nor of the form key=value"
            )
    return config, arguments


def _calm(output: Output) -> None:
    """Libraries' log lines, bars and warnings are left out; FLoRA's own warnings are shown as notes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning from every data loader's process
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("default")

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        parts = Path(filename).parts
        if "florapeft" in parts or not any(name in parts for name in _NOISY):
            output.say(f"note: {' '.join(str(message).split())}")

    warnings.showwarning = show
