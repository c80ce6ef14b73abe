"""The campaigns in small: what the default tests run, and what has to notice every broken rule."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.faults import damages, failing, kills, power, twice
from tests.faults.judge import Case, Reference, Tally
from tests.faults.server import Server

TIGHT = Case("tight", "tests.faults.programs:train", {"keep": 1})
WIDE = Case("wide", "tests.faults.programs:train", {"keep": 3})


@dataclass(frozen=True)
class Bench:
    """What campaigns run on.

    Args:
        server: runs their cases.
        second: for those that need two processes at once.
        one: how ``TIGHT`` ends without faults.
        three: how ``WIDE`` does.
        mutation: the rule that is broken.
    """

    server: Server
    second: Server
    one: Reference
    three: Reference
    mutation: str = ""

    @property
    def tight(self) -> Case:
        return replace(TIGHT, arguments={**TIGHT.arguments, "mutation": self.mutation})

    @property
    def wide(self) -> Case:
        return replace(WIDE, arguments={**WIDE.arguments, "mutation": self.mutation})


_CODES = (errno.ENOSPC, errno.EIO)

# In the order of what finds most in the least time.
CAMPAIGNS: dict[str, Callable[[Bench], Tally]] = {
    "killop": lambda b: kills.killop(b.server, b.tight, b.one, kills=15, seed=0),
    "kill": lambda b: kills.kill(b.server, b.tight, b.one, kills=15, seed=0),
    "states": lambda b: power.states(b.server, b.tight, b.one, number=75),
    "states of three": lambda b: power.states(b.server, b.wide, b.three, number=40),
    "errnos": lambda b: failing.errnos(b.server, b.tight, b.one, number=20, codes=_CODES),
    "corrupt": lambda b: damages.corrupt(b.server, b.wide, b.three, number=16),
    "twice": lambda b: twice.twice(b.server, b.second, b.wide, b.three),
}
