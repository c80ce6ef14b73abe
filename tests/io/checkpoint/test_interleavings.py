"""Saves, steps, loads and ends in any order: the disk is as a plain model of them says."""

from collections.abc import Iterator

import pytest

from tests.faults.interleave import CALLS, interleavings
from tests.faults.judge import reference
from tests.faults.server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["tests.faults.interleave:warm_up"]) as server:
        yield server


@pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_whatever_is_called_in_whatever_order(server: Server, number: int) -> None:
    tally = interleavings(server, CALLS, reference(server, CALLS), number=number)
    assert tally.failures == []
    assert tally.counts == {"ok": number}
