"""Runs PEFT's own tests, from the source distributions of its releases, against FloraConfig (see tests_peft/).

    python scripts/peft_suite.py                        # the installed release and the oldest that we support
    python scripts/peft_suite.py --peft 0.21.1 -k MHA   # another one; what is not ours goes to pytest
    python scripts/peft_suite.py --record               # also write benchmarks/results/peft_suite.json

Exits with 1 if a test fails. Releases are kept under .venv/peft-suite/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import date
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".venv" / "peft-suite"
INSTALLED = version("peft")


def oldest_supported() -> str:
    """The lower bound of our requirement: 0.21 as 0.21.0, the name of its release."""
    peft = next(r for r in map(Requirement, requires("florapeft")) if r.name == "peft")
    lower = next(s.version for s in peft.specifier if s.operator == ">=")
    return lower + ".0" * (2 - lower.count("."))


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", arguments[0], "--no-deps"]
    subprocess.run([*map(str, command), *map(str, arguments[1:])], check=True)


def fetch_tests(release: str) -> Path:
    """A folder to import the release's tests from, as the package `tests`."""
    folder = CACHE / f"peft-{release}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            # pip asks the build backend for the metadata of what it downloads; torch has brought setuptools.
            pip("download", "--no-binary", "peft", "--no-build-isolation", "-d", work, f"peft=={release}")
            with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
                archive.extractall(work, filter="data")
            unpacked = Path(work) / folder.name
            (unpacked / "tests" / "__init__.py").touch()  # the distribution leaves it out
            unpacked.rename(folder)
    return folder


def install(release: str) -> Path:
    """A folder to import the release from."""
    folder = CACHE / f"site-{release}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            pip("install", "--target", Path(work) / "site", f"peft=={release}")
            (Path(work) / "site").rename(folder)
    return folder


def run(release: str, pytest_arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The exit status of pytest, and the counts by suite and the skips by test and reason."""
    path = [fetch_tests(release)] if release == INSTALLED else [install(release), fetch_tests(release)]
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "-q", "--disable-warnings", f"--junitxml={report}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
        status = subprocess.run([*command, *pytest_arguments, ROOT / "tests_peft"], env=environment).returncode
        return status, count(ET.parse(report))


def count(report: ET.ElementTree) -> dict[str, Any]:
    suites: dict[str, dict[str, int]] = {}
    skips: Counter[tuple[str, str]] = Counter()
    for case in report.iter("testcase"):
        suite = suites.setdefault(
            case.get("classname", "").rpartition(".")[2], {"passed": 0, "failed": 0, "skipped": 0}
        )
        skipped = case.find("skipped")
        if skipped is not None:
            suite["skipped"] += 1
            reason = re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", skipped.get("message", ""))
            skips[case.get("name", "").partition("[")[0], reason] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            suite["failed"] += 1
        else:
            suite["passed"] += 1
    return {
        "suites": dict(sorted(suites.items())),
        "skips": [{"test": test, "reason": reason, "count": n} for (test, reason), n in sorted(skips.items())],
    }


def show(release: str, counts: dict[str, Any]) -> None:
    print(f"\nPEFT {release}'s tests against FloraConfig")
    kinds = ("passed", "failed", "skipped")
    rows = counts["suites"] | {"in all": {k: sum(s[k] for s in counts["suites"].values()) for k in kinds}}
    for suite, numbers in rows.items():
        print(f"  {suite:<34}" + "".join(f"{numbers[kind]:6} {kind}" for kind in kinds))
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--peft", action="append", metavar="RELEASE", help="a release of PEFT; may be repeated")
    which.add_argument("--record", action="store_true", help="write the counts to benchmarks/results/peft_suite.json")
    arguments, pytest_arguments = parser.parse_known_args()
    releases = arguments.peft or sorted({oldest_supported(), INSTALLED})
    CACHE.mkdir(parents=True, exist_ok=True)
    results, failed = {}, False
    for release in releases:
        status, results[release] = run(release, pytest_arguments)
        show(release, results[release])
        failed = failed or status != 0
    if arguments.record:
        sys.path.append(str(ROOT / "benchmarks"))
        import record

        path = record.RESULTS / "peft_suite.json"
        record.write(path, {"environment": record.environment(), "date": str(date.today()), "releases": results})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
