"""One of two processes that train together is ended: the other ends, and both go on. More by ``make crash-test``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import ranks
from tests.faults.crash import replayed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks(_can_trap: None) -> Iterator[ranks.Servers]:
    with ranks.servers() as found:
        yield found


def test_the_survivor_of_two_ends_and_the_run_goes_on(forks: ranks.Servers) -> None:
    tally = ranks.ranks(forks, ranks.references(forks), kills=5, seed=0)
    assert tally.failures == []
    assert tally.counts["killed in a save"] >= 1 and tally.counts["finished"] >= 1


def test_processes_end_after_their_group_is_destroyed(forks: ranks.Servers) -> None:
    assert ranks.partings(forks, number=10) == []


def test_a_failure_can_be_replayed() -> None:
    assert replayed("ranks/together/3", 0).campaign == "ranks"
