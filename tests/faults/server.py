"""A process that has torch and trainkit imported and forks a child per run, so that a run starts in milliseconds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults import seccomp
from tests.faults.trap import Outcome, Plan, Program, launch

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The other process, seen from the tests. Not for several threads at once.

    Args:
        preload: modules that it imports before it forks anything, or functions (``module:function``) that it calls.
    """

    def __init__(self, preload: Sequence[str] = ("tests.faults.programs:warm_up",)) -> None:
        # One thread, and no bytecode files that a killed run could leave half written.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", *preload],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, program: str, arguments: dict[str, Any], plan: Plan) -> Outcome:
        """Run ``module:function`` once under a plan."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([program, arguments, asdict(plan)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server ended with code {self._process.wait()}; its error is above")
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find(name: str) -> Program:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    found: Program = getattr(importlib.import_module(module), function)
    return found


def _serve(preload: Sequence[str]) -> None:
    seccomp.adopt_orphans()
    for name in preload:
        if ":" in name:
            find(name)()
        else:
            importlib.import_module(name)
    for line in sys.stdin:
        program, arguments, plan = json.loads(line)
        outcome = launch(find(program), arguments, Plan(**{**plan, "kinds": tuple(plan["kinds"])}))
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
