"""The documents: every Python block runs, every relative link leads somewhere, every docstring example holds."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import florapeft

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))
RUN_PAGES = [page for page in PAGES if page.name == "README.md" or page.parent != ROOT]

FENCE = re.compile(r"^( *)(```+|~~~+) *([\w+-]*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|\b(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    page: str
    line: int
    code: str


def python_blocks(text: str, page: str) -> list[Block]:
    """The ```python blocks of a page; each block's code starts at its own line, so that tracebacks point there."""
    return [
        Block(page, line := text.count("\n", 0, match.start(4)), "\n" * line + match[4])
        for match in FENCE.finditer(text)
        if match[3] == "python"
    ]


def links(text: str) -> list[str]:
    """Targets of the links and images of a page that are neither code nor on another site."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    targets = [match[1] or match[2] for match in LINK.finditer(prose)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (
            anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    return broken


def run_block(block: Block) -> None:
    exec(compile(block.code, block.page, "exec"), {"__name__": "__main__"})


BLOCKS = [
    block
    for page in RUN_PAGES
    for block in python_blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


MODULES = [module.name for module in pkgutil.walk_packages(florapeft.__path__, "florapeft.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


class TestTheChecksThemselves:
    """Each check above is seen to fail on a page that is wrong, and to pass on one that is right."""

    PAGE = (
        '# The *first* part\n[a](#the-first-part) [b](there.md#there) ![c](missing.png) <img src="gone.svg">\n'
        "[d](https://example.org/x) [e](#no-such) `[f](code.md)`\n\n```python\nvalue = 1\nraise KeyError(value)\n```\n"
        "```bash\n[g](code.md)\n```\n```python\nvalue\n```\n"
    )

    def test_links(self, tmp_path):
        (tmp_path / "there.md").write_text("# There\n")
        page = tmp_path / "page.md"
        page.write_text(self.PAGE)
        assert broken_links(page) == ["missing.png", "gone.svg", "#no-such"]

    def test_blocks(self):
        first, second = python_blocks(self.PAGE, "page.md")
        with pytest.raises(KeyError) as failure:
            run_block(first)
        assert failure.traceback[-1].lineno + 1 == self.PAGE.splitlines().index("raise KeyError(value)") + 1
        with pytest.raises(NameError):  # a block does not see the names of the one before
            run_block(second)
