"""What tests of several files of the Trainer share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import huggingface_hub
import pytest

from tests.trainer.stand_in_hub import StandInHub


@pytest.fixture(autouse=True, scope="module")
def _imported_is_no_garbage() -> Iterator[None]:
    """Leave what is there already to a collection after the file.

    Every training begins with a collection by accelerate. Over all that torch and transformers import it takes ten
    times as long as the training of these tests.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub on this machine, which huggingface_hub is configured for."""
    made = StandInHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.endpoint)
    yield made
    made.close()
