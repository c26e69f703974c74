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


def test_the_caption_says_what_is_left_out_and_why(tables):
    setting = {"epochs": 1, "batch_size": 2, "head_rate": 0.01}
    left_out = {"LoHa": "TypeError: <class 'Conv3d'>", "LoKr": "TypeError: <class 'Conv3d'>", "BitFit": "no bias"}
    counts = {"LoRA": 1010, "LoKr": 970, "AdaLoRA": 1030, "full fine-tuning": 9000}
    rows = {name: {"parameters": n, "head_rate": None, "rate": 0.01} for name, n in counts.items()}
    results = {"methods": rows, "goal": 1000, "examples": {"test": 1000}, "setting": setting, "layers": 3}
    results |= {"search_seeds": {"LoRA": 1}, "left_out": left_out, "source_accuracy": 0.5}
    caption = tables.evidence_tables._caption(results)
    assert "names 50.0% in its source task." in caption
    assert "Not within 2% of the 1,000 parameters: LoKr, AdaLoRA." in caption
    assert caption.endswith("Left out: LoHa, LoKr (TypeError: &lt;class 'Conv3d'&gt;). Left out: BitFit (no bias).")
