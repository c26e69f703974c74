"""What every test shares: no network, a cache of its own, fixed seeds, one thread per worker."""

import ast
import logging
import os
import random
import runpy
import shlex
import shutil
import tempfile
from pathlib import Path

# Before anything imports the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:  # the workers inherit the controller's folder, and the controller removes it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="florapeft-tests-")
else:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

if IS_XDIST_WORKER:
    torch.set_num_threads(1)

EXAMPLES = Path(__file__).parent.parent / "examples"

# A first example often includes a warm-up, so no deadline; in CI the same examples every time.
hypothesis.settings.register_profile(
    "florapeft", deadline=None, print_blob=True, derandomize="CI" in os.environ, database=None
)
hypothesis.settings.load_profile("florapeft")


def pytest_unconfigure():
    if not IS_XDIST_WORKER:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every test, whatever ran before it; hypothesis draws its own examples."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """In every test, though benchmarks, run in the test before, silence what the package logs."""
    logger = logging.getLogger("florapeft")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder that examples/tiny.py writes."""
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(EXAMPLES / "tiny.py"))["main"](folder)
    return folder


@pytest.fixture(scope="session")
def jobs(tiny):
    """By task, the arguments of the `flora train` lines in the docstring of examples/tiny.py."""
    found = {}
    docstring = ast.get_docstring(ast.parse((EXAMPLES / "tiny.py").read_text(encoding="utf-8")), clean=False)
    for line in docstring.replace("\\\n", "").splitlines():
        if line.startswith("    flora train "):
            file, *overrides = shlex.split(line)[2:]
            found[Path(file).stem] = [
                str(EXAMPLES.parent / file),
                *(override.replace("tiny/", f"{tiny}/") for override in overrides),
            ]
    return found
