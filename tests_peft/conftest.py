"""What PEFT's tests need: no network, the models in the working directory, and only the tests that are about FLoRA."""

import os
import shutil
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# Before anything imports the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:  # the workers inherit the controller's folder, and the controller fills and removes it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="florapeft-peft-")
FOLDER = Path(os.environ["HF_HOME"]) / "models"

import pytest
import transformers
from models import write_models

from florapeft import FloraConfig

# On encoder-decoder models PEFT before 0.21.2 keeps this method of transformers, which 5.18 has no more; with every
# method of PEFT such a model then fails before it is adapted. Nothing calls it.
if not hasattr(transformers.GenerationMixin, "_prepare_encoder_decoder_kwargs_for_generation"):
    transformers.GenerationMixin._prepare_encoder_decoder_kwargs_for_generation = None

# PEFT's tests need no more than this class of diffusers, which is not installed on Python 3.10.
if find_spec("diffusers") is None:
    sys.modules["diffusers"] = SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    import_module("tests.testing_common")
    del sys.modules["diffusers"]

# Tests without parameters that walk over every registered method.
ABOUT_ALL_METHODS = ("test_from_peft_type",)


def pytest_configure():
    if not IS_XDIST_WORKER:
        write_models(FOLDER)


def pytest_unconfigure():
    if not IS_XDIST_WORKER:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """PEFT's classes also hold tests of its other methods, which PEFT runs itself."""
    ours, others = [], []
    for item in items:
        (ours if item.name in ABOUT_ALL_METHODS or _is_ours(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = ours


def _is_ours(item):
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is FloraConfig or isinstance(value, FloraConfig) for value in values)


@pytest.fixture(autouse=True)
def in_the_folder_of_models(monkeypatch):
    monkeypatch.chdir(FOLDER)


@pytest.fixture(autouse=True)
def branches_of_other_methods(request, monkeypatch):
    """PEFT's tests branch on the classes of its methods.

    A module's `BORROWED` lists those whose place FloraConfig takes: (part of the tests' names, PEFT's "module.Class").
    """
    for tests, name in request.module.BORROWED:
        if tests in request.node.name:
            monkeypatch.setattr(f"tests.{name}", FloraConfig)
