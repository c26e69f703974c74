"""What every test shares: no network, a cache of its own, fixed seeds, one thread per worker."""

import os
import random
import shutil
import tempfile

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
