"""Real architectures, tiny and random, adapted with "all-weights": what docs/architectures.md says of them."""

import json
from importlib.metadata import version

import pytest
from architectures import RESULTS, examine, problems
from tiny_models import MODELS

RECORD = json.loads((RESULTS / "architectures.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_architecture(name):
    """Identity at the start, training, reload, merge; and the same layers adapted and left out as in the table."""
    library = RECORD["rows"][name]["library"]
    pytest.importorskip(library)  # diffusers needs Python 3.11
    found = examine(name)
    assert problems(found) == {}
    # Another version of the library may build another model.
    if version(library) == RECORD["environment"]["versions"][library]:
        assert found == RECORD["rows"][name]


def test_the_record_has_every_row():
    assert list(RECORD["rows"]) == list(MODELS)
