"""The tables in README.md and docs/ say what the files under benchmarks/results/ say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "tables.py"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import tables

    return tables


def test_every_table_is_up_to_date():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_check_can_fail(tables):
    page = (ROOT / "README.md").read_text()
    start = page.index("<!-- table demo -->")
    digit = next(i for i in range(start, len(page)) if page[i].isdigit())
    forged = page[:digit] + str((int(page[digit]) + 1) % 10) + page[digit + 1 :]
    assert tables.render(forged) == page


def test_every_table_stands_on_a_page(tables):
    pages = "".join(page.read_text() for page in tables.pages())
    assert {match[2] for match in tables.MARKED.finditer(pages)} == set(tables.TABLES)
