"""What a disk may hold after the power is cut, from a record of the calls that were made until then.

A call changes the names in a folder or the bytes of a file, and is durable once every folder or file that it touches
has been fsynced. Of the calls that are not durable yet, the disk may hold any:

    kill       all of them: the process died and the machine lived
    strict     none: only what was fsynced is there
    zero       all names; of the bytes, only lengths or not even these: names got ahead of data
    torn       all, but the last write only by half
    reordered  a random choice

Renames are atomic and the order of durable calls is kept, as every journalling file system does.

Source: the abstract persistence model of Pillai et al. 2014 (ALICE), sec. 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.calls import Call

KINDS = ("kill", "strict", "zero", "torn", "reordered")
_EXCHANGE, _NO_REPLACE, _KEEP_SIZE = 2, 1, 1

Tree = dict[str, "bytes | str | None"]
"""Paths relative to a root: bytes of a file, the target of a link, None for a folder."""


@dataclass
class _Change:
    """One change, in terms of numbered files and folders (0 is the root).

    ``unsynced`` holds those whose fsync it still waits for.
    """

    kind: str
    node: int
    at: tuple[int, str] = (0, "")
    to: tuple[int, str] = (0, "")
    swapped: int = 0
    offset: int = 0
    data: bytes = b""
    unsynced: set[int] = field(default_factory=set)


class _Nodes:
    """Numbered files, folders and links."""

    def __init__(self) -> None:
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytearray] = {}
        self.links: dict[int, str] = {}

    def add(self, content: bytes | str | None) -> int:
        node = len(self.folders) + len(self.files) + len(self.links)
        if content is None:
            self.folders[node] = {}
        elif isinstance(content, str):
            self.links[node] = content
        else:
            self.files[node] = bytearray(content)
        return node

    def find(self, path: str) -> int | None:
        node = 0
        for name in path.split("/") if path else ():
            found = self.folders.get(node, {}).get(name)
            if found is None:
                return None
            node = found
        return node

    def tree(self) -> Tree:
        found: Tree = {}
        waiting = [("", 0)]
        while waiting:
            path, node = waiting.pop()
            for name, child in self.folders[node].items():
                here = f"{path}/{name}" if path else name
                if child in self.folders:
                    found[here] = None
                    waiting.append((here, child))
                else:
                    found[here] = self.links[child] if child in self.links else bytes(self.files[child])
        return found


class Disk:
    """The calls of a run, one after the other, and what may be left of them.

    Args:
        root: the folder that is modelled; what it held at the start is durable.
        before: what it held.
    """

    def __init__(self, root: str, before: Tree) -> None:
        self.root = root
        self.before = before
        self._nodes = _planted(before)
        self._changes: list[_Change] = []

    def feed(self, call: Call) -> None:
        """The next call was executed. One that must have failed changes nothing."""
        if not call.is_named:
            return
        change = self._understand(call)
        if change is not None:
            _apply(self._nodes, change)
            self._changes.append(change)

    def left(self, kind: str, random: Random) -> Tree:
        """What the disk may hold now.

        Args:
            kind: one of ``KINDS``.
            random: decides where the kind leaves a choice.
        """
        nodes = _planted(self.before)
        for number in range(len(self._nodes.folders) + len(self._nodes.files) + len(self._nodes.links)):
            # The same numbers as in the full history; what no name leads to is not seen.
            if number not in nodes.folders and number not in nodes.files and number not in nodes.links:
                nodes.add(None if number in self._nodes.folders else self._nodes.links.get(number, b""))
        pending = [change for change in self._changes if change.unsynced]
        writes = [change for change in pending if change.kind == "write"]
        lengths = random.random() < 0.5
        for change in self._changes:
            if not change.unsynced or kind == "kill":
                _apply(nodes, change)
            elif kind == "zero":
                _apply_without_data(nodes, change, lengths=lengths)
            elif kind == "torn":
                _apply(nodes, change, half=bool(writes) and change is writes[-1])
            elif kind == "reordered" and random.random() < 0.5:
                _apply(nodes, change)
        return nodes.tree()

    def _place(self, path: str) -> tuple[int, str] | None:
        """The folder and the name that a path means; None if the folder does not exist or lies outside."""
        if not path.startswith(self.root + "/"):
            return None
        parent, _, name = path[len(self.root) + 1 :].rpartition("/")
        folder = self._nodes.find(parent)
        return None if folder is None or folder not in self._nodes.folders else (folder, name)

    def _node(self, path: str) -> int | None:
        is_inside = path == self.root or path.startswith(self.root + "/")
        return self._nodes.find(path[len(self.root) + 1 :]) if is_inside else None

    def _understand(self, call: Call) -> _Change | None:
        node, place = self._node(call.path), self._place(call.path)
        if call.kind in ("fsync", "syncfs"):
            for change in self._changes:
                change.unsynced -= change.unsynced if call.kind == "syncfs" else {-1 if node is None else node}
            return None
        if call.kind in ("write", "truncate", "allocate"):
            return self._on_bytes(call, node)
        if place is None:
            return None
        if call.kind == "open" and node is not None:
            cuts = call.flags & os.O_TRUNC and not call.flags & os.O_EXCL
            return _Change("truncate", node, unsynced={node}) if cuts and node in self._nodes.files else None
        if call.kind in ("open", "mkdir", "symlink"):
            creates = call.kind != "open" or call.flags & os.O_CREAT
            if not creates or node is not None:
                return None
            content = {"open": b"", "mkdir": None, "symlink": call.other}[call.kind]
            return _Change("link", self._nodes.add(content), to=place, unsynced={place[0]})
        if call.kind in ("unlink", "rmdir"):
            is_folder = node in self._nodes.folders
            if node is None or is_folder != (call.kind == "rmdir") or (is_folder and self._nodes.folders[node]):
                return None
            return _Change("unlink", node, at=place, unsynced={place[0]})
        return self._on_two_names(call, node, place) if node is not None else None

    def _on_bytes(self, call: Call, node: int | None) -> _Change | None:
        if node is None or node not in self._nodes.files:
            return None
        if call.kind == "write":
            return _Change("write", node, offset=call.offset, data=call.data, unsynced={node})
        if call.kind == "truncate":
            return _Change("truncate", node, offset=call.length, unsynced={node})
        longer = call.length > len(self._nodes.files[node]) and not call.flags & _KEEP_SIZE
        return _Change("truncate", node, offset=call.length, unsynced={node}) if longer else None

    def _on_two_names(self, call: Call, node: int, place: tuple[int, str]) -> _Change | None:
        target, there = self._place(call.other), self._node(call.other)
        if target is None or call.kind not in ("rename", "link"):
            return None
        unsynced = {place[0], target[0]}
        if call.kind == "link":
            return None if there is not None else _Change("link", node, to=target, unsynced={target[0]})
        if call.flags & _EXCHANGE:
            if there is None:
                return None
            return _Change("rename", node, at=place, to=target, swapped=there, unsynced=unsynced)
        is_refused = there is not None and (call.flags & _NO_REPLACE or self._nodes.folders.get(there))
        return None if is_refused else _Change("rename", node, at=place, to=target, unsynced=unsynced)


def _planted(before: Tree) -> _Nodes:
    nodes = _Nodes()
    for path in sorted(before):
        parent, _, name = path.rpartition("/")
        folder = nodes.find(parent)
        assert folder is not None
        nodes.folders[folder][name] = nodes.add(before[path])
    return nodes


def _apply(nodes: _Nodes, change: _Change, *, half: bool = False) -> None:
    if change.kind == "write":
        data = change.data[: len(change.data) // 2] if half else change.data
        _extend(nodes.files[change.node], change.offset)
        nodes.files[change.node][change.offset : change.offset + len(data)] = data
    elif change.kind == "truncate":
        del nodes.files[change.node][change.offset :]
        _extend(nodes.files[change.node], change.offset)
    else:
        _apply_to_names(nodes, change)


def _apply_to_names(nodes: _Nodes, change: _Change) -> None:
    if change.kind in ("unlink", "rename"):
        folder, name = change.at
        if nodes.folders[folder].get(name) == change.node:
            del nodes.folders[folder][name]
        if change.swapped:
            nodes.folders[folder][name] = change.swapped
    if change.kind in ("link", "rename"):
        folder, name = change.to
        nodes.folders[folder][name] = change.node


def _apply_without_data(nodes: _Nodes, change: _Change, *, lengths: bool) -> None:
    if change.kind not in ("write", "truncate"):
        _apply_to_names(nodes, change)
    elif lengths:
        end = change.offset + len(change.data)
        _extend(nodes.files[change.node], end)


def _extend(content: bytearray, length: int) -> None:
    content.extend(bytes(max(0, length - len(content))))


def snapshot(root: str | Path) -> Tree:
    """What a folder holds. Links are not followed."""
    found: Tree = {}
    base = Path(root)
    for folder, folders, files in os.walk(base):
        here = Path(folder)
        for name in [*folders, *files]:
            path = here / name
            key = path.relative_to(base).as_posix()
            if path.is_symlink():
                found[key] = os.readlink(path)
            else:
                found[key] = None if path.is_dir() else path.read_bytes()
    return found


def plant(tree: Tree, root: str | Path) -> None:
    """Make a folder hold a tree; it must be empty or missing."""
    base = Path(root)
    base.mkdir(parents=True, exist_ok=True)
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (base / path).mkdir()
        elif isinstance(content, str):
            (base / path).symlink_to(content)
        else:
            (base / path).write_bytes(content)


def replay(root: str, before: Tree, calls: Iterable[Call]) -> Disk:
    """A disk after all of the calls."""
    disk = Disk(root, before)
    for call in calls:
        disk.feed(call)
    return disk
