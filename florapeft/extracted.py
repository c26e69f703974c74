"""What an extraction reports, and where its parts are kept until it is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHOWN = 10  # of what is lost


@dataclass(frozen=True)
class WeightFit:
    """How well one weight's change is kept.

    Attributes:
        name: of the target.
        shape: of the weight.
        rank: one entry per mode.
        parameters: of core and factors.
        norm: Frobenius norm of the change.
        error: norm of what is missing of it, relative to `norm`; measured on the tensors in their final dtype.
    """

    name: str
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    parameters: int
    norm: float
    error: float


@dataclass(frozen=True)
class Lost:
    """A tensor that changed and that the adapter does not have.

    Attributes:
        name: in the base's state dict.
        norm: Frobenius norm of the change.
        relative: the same, relative to the base's tensor; None where that is zero or not floating point.
    """

    name: str
    norm: float
    relative: float | None


@dataclass(frozen=True)
class Extraction:
    """What `extract` kept and what it lost.

    Attributes:
        weights: the targets that changed and have an adapter, in the order of the model.
        unchanged: names of targets that did not change and have none.
        kept: names of tensors that are saved as they are in the tuned model.
        lost: everything else that changed, the largest change first.
    """

    weights: tuple[WeightFit, ...]
    unchanged: tuple[str, ...]
    kept: tuple[str, ...]
    lost: tuple[Lost, ...]

    @property
    def parameters(self) -> int:
        """Entries of all cores and factors."""
        return sum(fit.parameters for fit in self.weights)

    @property
    def error(self) -> float:
        """Norm of what is missing in all weights that have an adapter, relative to that of their change."""
        missing = math.hypot(*(fit.error * fit.norm for fit in self.weights))
        return missing / math.hypot(*(fit.norm for fit in self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"parameters": self.parameters, "error": self.error, **asdict(self)}

    def __str__(self) -> str:
        header = ("weight", "shape", "rank", "parameters", "norm", "error")
        rows = [
            (
                fit.name,
                _sizes(fit.shape),
                _sizes(fit.rank),
                f"{fit.parameters:,}",
                f"{fit.norm:.3g}",
                f"{fit.error:.4f}",
            )
            for fit in self.weights
        ]
        rows.append(("in all", "", "", f"{self.parameters:,}", "", f"{self.error:.4f}"))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        if self.unchanged:
            lines.append(f"unchanged: {len(self.unchanged)}, as {self.unchanged[0]}")
        if self.kept:
            lines.append(f"kept in full: {len(self.kept)}, as {self.kept[0]}")
        lines += [f"lost: {describe_lost(lost)}" for lost in self.lost[:_SHOWN]]
        if len(self.lost) > _SHOWN:
            lines.append(f"lost: {len(self.lost) - _SHOWN} more, with smaller changes")
        return "\n".join(line.rstrip() for line in lines)


def describe_lost(lost: Lost) -> str:
    """`name, norm of the change (share of the base's)`."""
    share = "" if lost.relative is None else f" ({100 * lost.relative:.3g}% of the base's)"
    return f"{lost.name}, {lost.norm:.3g}{share}"


class Store:
    """A folder of results per weight, each written whole or not at all, and read only if it is what is asked for.

    Args:
        folder: made when the first result is put there; None keeps nothing.
    """

    def __init__(self, folder: str | PathLike | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, name: str, kind: str, about: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The result that was put there with the same `about`, or None."""
        if self.folder is None or not (path := self._path(name, kind)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("about") != _as_text(about):
                    return None
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):  # written by something else: it is computed and written again
            return None

    def put(self, name: str, kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep the result."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, kind)
        partial = path.with_suffix(".partial")
        try:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, partial, {"about": _as_text(about)}
            )
            os.replace(partial, path)
        except (SafetensorError, OSError) as error:
            raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{kind}.safetensors"


def _as_text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _sizes(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
