"""Processes that are forked from, started once for all tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import seccomp
from tests.faults.judge import reference
from tests.faults.server import Server
from tests.faults.suite import TIGHT, WIDE, Bench


@pytest.fixture(scope="package")
def _can_trap() -> None:
    if reason := seccomp.why_not():
        pytest.skip(f"system calls cannot be stopped here: {reason}")


@pytest.fixture(scope="package")
def samples(_can_trap: None) -> Iterator[Server]:
    """Forks processes without torch."""
    with Server(["tests.faults.samples"]) as server:
        yield server


@pytest.fixture(scope="package")
def bench(_can_trap: None) -> Iterator[Bench]:
    """Two processes with torch, and what their runs give without faults."""
    with Server() as server, Server() as second:
        yield Bench(server, second, reference(server, TIGHT), reference(server, WIDE))
