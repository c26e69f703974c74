"""Gives a parametrised test of PEFT's other rows, where they are no list that could be changed in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def repoint(cls: type, tests: str, arguments: str, rows: Iterable[Any]) -> None:
    """Parametrise those tests of `cls` that have `tests` in their name and these `arguments` over `rows`.

    Raises:
        LookupError: there are none; this release of PEFT names them otherwise.
    """
    found = False
    for name in dir(cls):
        marks = getattr(getattr(cls, name), "pytestmark", []) if tests in name else []
        for index, mark in enumerate(marks):
            if mark.name == "parametrize" and mark.args[0] == arguments:
                marks[index] = pytest.mark.parametrize(arguments, list(rows), **mark.kwargs).mark
                found = True
    if not found:
        raise LookupError(f"{cls.__name__} has no tests {tests!r} with the arguments {arguments!r}")
