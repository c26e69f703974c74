"""Writing to disk so that nothing is lost: beside the target first, then one rename; no folder replaced unasked."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

JOB_FILE = "job.yaml"  # a folder that holds one was written by `flora train`


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` to write into; at the end it takes the place of `path` by renaming.

    On any error the new folder is removed and `path` is as it was. Processes of one job that share a file system may
    all write into the folder that is yielded, but only one may hold this context.

    Args:
        path: the folder to be there in the end.
        replace: whether an existing `path` may be replaced; if not, that is an error before anything is written.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: no permission, no space; the message names `path` and says what became of it.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists; it is not overwritten unless --overwrite is given")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    kept = f"{path} was left as it was" if path.exists() else "nothing was written"
    try:
        partial.mkdir(parents=True)
        yield partial
        _publish(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {_reason(error)}; {kept}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def atomic_write(path: Path, text: str) -> None:
    """Writes a text file by way of a temporary one beside it, so that a failure leaves the old file whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Writes `record` as JSON that every parser reads: numbers that are not finite become null."""
    atomic_write(path, to_json(record) + "\n")


def to_json(record: Any) -> str:
    return json.dumps(_finite(record), indent=2, ensure_ascii=False)


def prepare_output(
    output: Path, *, resume: bool = False, overwrite: bool = False, can_resume: bool = True
) -> str | None:
    """`check_output`, and with `overwrite` at once `set_aside`; returns what that returns."""
    check_output(output, resume=resume, overwrite=overwrite, can_resume=can_resume)
    return set_aside(output) if overwrite else None


def check_output(output: Path, *, resume: bool = False, overwrite: bool = False, can_resume: bool = True) -> None:
    """Makes the output folder of a training run, or finds it fit to be used; run by one process.

    A new or empty folder is taken; that of an earlier run with `resume`, to go on in it, or with `overwrite`, for
    `set_aside`. Folders that `flora train` did not write are left alone. Where a run cannot be gone on with
    (`can_resume`), that is not offered.

    Raises:
        ValueError, OSError: one line that names `output` and the ways out.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; a folder is needed")
    is_empty = not output.exists() or not any(output.iterdir())
    is_ours = (output / JOB_FILE).is_file()
    if resume and not is_ours:
        found = "is empty or missing" if is_empty else f"holds no {JOB_FILE}"
        raise FileNotFoundError(f"nothing to resume: output {output} {found}")
    if not is_empty and not is_ours:
        raise FileExistsError(f"output {output} exists and was not written by flora train; give another output")
    if not is_empty and not resume and not overwrite:
        ways = "continue it with --resume, or" if can_resume else "or"
        raise FileExistsError(f"output {output} exists; give another output, {ways} replace it with --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()  # found out now rather than after an hour of training
        (output / ".writable").unlink()
    except OSError as error:
        raise OSError(f"cannot write to output {output}: {_reason(error)}") from error


def set_aside(output: Path) -> str | None:
    """Renames an earlier run's folder to `<output>.old-N`, for checkpoints are never deleted; `output` is empty then.

    Returns:
        What the user should know, or None if there is no earlier run.
    """
    if not (output / JOB_FILE).is_file():
        return None
    older = first_free(output, ".old-", start=1)
    output.rename(older)
    output.mkdir()
    return f"the earlier run in {output} was renamed to {older}"


def first_free(path: Path, separator: str, start: int) -> Path:
    """`path` + separator + the smallest number from `start` on that does not exist yet."""
    number = start
    while (candidate := path.with_name(f"{path.name}{separator}{number}")).exists():
        number += 1
    return candidate


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete Trainer checkpoint; one that a kill left half-written is passed over.

    The Trainer writes `trainer_state.json` last, so a checkpoint is complete if that file can be read.
    """
    steps = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdecimal():
            continue
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        steps[int(number)] = path
    return steps[max(steps)] if steps else None


def _publish(partial: Path, path: Path) -> None:
    """Renames `partial` to `path`; what was at `path` is deleted only after the new folder stands there."""
    if not path.exists():
        partial.rename(path)
        return
    previous = path.with_name(f".{path.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    path.rename(previous)
    try:
        partial.rename(path)
    except OSError:
        previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or " ".join(str(error).split())).rstrip(".")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
