"""What all tests share: one thread, the same random numbers in every run, a compiler that forgets between files.

torch's deterministic mode stays off: results are compared bit by bit in the mode that users run in.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Tiny tensors: a second thread only adds waiting, and on a shared machine noise.
torch.set_num_threads(1)
# The first call after a compilation takes seconds, so no deadline; nothing is kept between runs, and all runs are
# alike. `pytest --hypothesis-profile=explore` draws new examples each time.
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=20)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _fresh_compiler() -> Iterator[None]:
    """Free what a file has compiled."""
    yield
    torch.compiler.reset()
