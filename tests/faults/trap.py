"""Run a program in a child process and do something to it at one of its file-changing calls, or at a moment.

The supervisor counts the calls that touch paths below a root, in the order in which they stop, from 1.
"""

from __future__ import annotations

import atexit
import errno
import json
import marshal
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import seccomp
from tests.faults.calls import BLIND, Call, decode, process_of

Emit = Callable[..., None]
"""Tells the supervisor something, as keywords; it is heard before the next file call of the same thread."""
Program = Callable[..., None]
"""``program(emit, **arguments)``; what it raises is printed and ends its process with code 1."""


@dataclass(frozen=True)
class Plan:
    """What is to happen to one run.

    Args:
        root: calls that touch paths at or below it are counted.
        action: "kill" (a signal before call ``at``), "errno" (call ``at`` fails) or "short" (a write at ``at`` writes
            half).
        at: the call, from 1; 0 for none.
        code: the errno.
        is_sticky: whether all later calls fail as well.
        signal: what "kill" and ``after`` send.
        kinds: only these kinds of calls are counted; empty for all.
        trace: whether calls are stopped at all; without it only ``after`` and ``limit`` have an effect.
        reads: whether opening for reading is counted as well.
        record: the file that gets the counted calls; empty for none.
        after: the signal this many seconds after the start; 0 for never.
        limit: seconds until the run counts as hung.
        leave_children: whether processes that the killed one leaves behind live on.
    """

    root: str = ""
    action: str = "kill"
    at: int = 0
    code: int = 0
    is_sticky: bool = False
    signal: int = signal.SIGKILL
    kinds: tuple[str, ...] = ()
    trace: bool = True
    reads: bool = False
    record: str = ""
    after: float = 0.0
    limit: float = 60.0
    leave_children: bool = False


@dataclass
class Outcome:
    """What became of a run.

    Args:
        code: exit code; minus the signal's number for a signal.
        is_hung: whether it was ended because its time was up.
        calls: how many calls were counted.
        hits: the calls that the plan's action met, as "kind path".
        blind: what happened to files behind the supervisor's back; a record is complete only if this is empty.
        messages: what the program told, each with ``at``, the number of calls before it.
        stderr: the end of what it printed.
        seconds: from start to end.
        orphans: how many processes it left behind.
    """

    code: int = 0
    is_hung: bool = False
    calls: int = 0
    hits: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    stderr: str = ""
    seconds: float = 0.0
    orphans: int = 0

    def told(self, name: str) -> list[Any]:
        """The values that the program gave under one keyword, in order."""
        return [message[name] for message in self.messages if name in message]


def launch(program: Program, arguments: dict[str, Any], plan: Plan) -> Outcome:
    """Fork, run the program in the child under the plan, wait for its end.

    The child waits for its threads and runs its exit handlers, as every Python process does.
    """
    reader, writer = os.pipe()
    errors = os.memfd_create("stderr")
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        os.close(reader)
        ours.close()
        _become(program, arguments, plan, writer, errors, theirs)
    os.close(writer)
    theirs.close()
    watch = _Watch(plan, child, reader, ours)
    try:
        outcome = watch.run()
    finally:
        for descriptor in (reader, watch.listener):
            if descriptor is not None:
                os.close(descriptor)
        ours.close()
    outcome.stderr = os.pread(errors, 1 << 20, max(0, os.stat(errors).st_size - 4000)).decode(errors="replace")
    os.close(errors)
    if plan.record:
        Path(plan.record).write_bytes(marshal.dumps([astuple(call) for call in watch.recorded]))
    return outcome


def read_record(path: str | Path) -> list[Call]:
    """The calls of a run, as ``Plan.record`` left them."""
    return [Call(*values) for values in marshal.loads(Path(path).read_bytes())]


def _become(
    program: Program, arguments: dict[str, Any], plan: Plan, writer: int, errors: int, supervisor: socket.socket
) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(errors, 1)
    os.dup2(errors, 2)

    def emit(**message: Any) -> None:
        os.write(writer, json.dumps(message).encode() + b"\n")

    if plan.trace:
        listener = seccomp.install(reads=plan.reads)
        socket.send_fds(supervisor, [b"x"], [listener])
        os.close(listener)
    supervisor.close()
    code = 1
    try:
        program(emit, **arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    _leave(code)


def _leave(code: int) -> None:
    """End the process as the interpreter does, first the threads, then the exit handlers, then the buffers; but without
    taking all modules apart, which takes a second for those of torch."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Watch:
    """The supervisor of one child."""

    def __init__(self, plan: Plan, child: int, reader: int, sock: socket.socket) -> None:
        self.plan, self.child, self.reader = plan, child, reader
        self.root = os.path.realpath(plan.root) if plan.root else ""
        self.outcome = Outcome()
        self.recorded: list[Call] = []
        self.listener: int | None = None
        self._unread = b""
        if plan.trace:
            _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
            if not descriptors:
                raise OSError("the child could not stop its calls: " + (seccomp.why_not() or "it died"))
            self.listener = descriptors[0]

    def run(self) -> Outcome:
        started = time.monotonic()
        handle = os.pidfd_open(self.child)
        poll = select.poll()
        for descriptor in (handle, self.reader, self.listener):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        is_killed = False
        while True:
            now = time.monotonic() - started
            if self.plan.after and now >= self.plan.after and not is_killed:
                is_killed = True
                os.kill(self.child, self.plan.signal)
            if now >= self.plan.limit and not self.outcome.is_hung:
                self.outcome.is_hung = True
                os.killpg(self.child, signal.SIGKILL)
            wake = self.plan.limit if is_killed or not self.plan.after else self.plan.after
            ready = dict(poll.poll(max(1.0, 1000 * min(wake - now, 1.0))))
            if self.reader in ready and not self._hear():
                poll.unregister(self.reader)
            if self.listener in ready:
                if ready[self.listener] & select.POLLHUP:
                    poll.unregister(self.listener)
                else:
                    self._answer()
            if handle in ready:
                break
        os.close(handle)
        self._hear()
        _, status = os.waitpid(self.child, 0)
        self.outcome.code = os.waitstatus_to_exitcode(status)
        self.outcome.seconds = time.monotonic() - started
        self._end_the_rest()
        return self.outcome

    def _end_the_rest(self) -> None:
        """What is left of the child's session is counted, and ended if the plan says so."""
        alive = members(self.child)
        self.outcome.orphans = len(alive)
        if not self.plan.leave_children:
            end_session(self.child)

    def _hear(self) -> bool:
        """Read what the program has told; False once nobody can tell any more."""
        while select.select([self.reader], [], [], 0)[0]:
            part = os.read(self.reader, 1 << 16)
            if not part:
                return False
            *lines, self._unread = (self._unread + part).split(b"\n")
            self.outcome.messages += [{**json.loads(line), "at": self.outcome.calls} for line in lines]
        return True

    def _answer(self) -> None:
        """Deal with one stopped call."""
        assert self.listener is not None
        stopped = seccomp.receive(self.listener)
        if stopped is None:
            return
        try:
            call = decode(stopped)
        except OSError:
            # A bad descriptor or pointer, which the kernel will refuse, or a process that is gone.
            seccomp.let_run(self.listener, stopped)
            return
        if not seccomp.is_waiting(self.listener, stopped):
            return
        self._hear()
        if call.kind == "io_uring_setup":
            # Its writes could not be seen; every library has another way when the kernel lacks it.
            seccomp.fail(self.listener, stopped, errno.ENOSYS)
        elif call.is_below(self.root):
            self._count(stopped, call)
        else:
            seccomp.let_run(self.listener, stopped)

    def _count(self, stopped: seccomp.Stopped, call: Call) -> None:
        plan, outcome = self.plan, self.outcome
        assert self.listener is not None
        if call.kind in BLIND:
            outcome.blind.append(f"{call.kind} {call.path}")
        counts = not plan.kinds or call.kind in plan.kinds
        outcome.calls += counts
        is_hit = counts and plan.at and (outcome.calls == plan.at or (plan.is_sticky and outcome.calls > plan.at))
        if is_hit:
            outcome.hits.append(f"{call.kind} {call.path}")
            if self._act(stopped, call):
                return
        if plan.record:
            self.recorded.append(call)
        seccomp.let_run(self.listener, stopped)

    def _act(self, stopped: seccomp.Stopped, call: Call) -> bool:
        """Do what the plan says; whether the call has been dealt with."""
        assert self.listener is not None
        action = self.plan.action
        if action == "kill":
            os.kill(self.child, self.plan.signal)
            # Any other signal leaves the process to decide, and the call is still to be made.
            return self.plan.signal == signal.SIGKILL
        if action == "errno":
            seccomp.fail(self.listener, stopped, self.plan.code)
        elif action == "short" and stopped.name == "write" and len(call.data) > 1:
            file = seccomp.borrow(process_of(stopped.thread), stopped.args[0])
            seccomp.succeed(self.listener, stopped, os.write(file, call.data[: len(call.data) // 2]))
            os.close(file)
        else:
            return False
        return True


def members(session: int) -> list[int]:
    """The living processes of a session."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_member(int(name), session)]


def end_session(session: int) -> None:
    """SIGKILL to every process of a session; returns when they are gone."""
    while alive := members(session):
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def _is_member(process: int, session: int) -> bool:
    try:
        state, _, _, its_session = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return False
    return state != "Z" and int(its_session) == session
