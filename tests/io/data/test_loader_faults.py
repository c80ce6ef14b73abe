"""Workers that fail, are killed or hang; a loop that stops; data that make no batch."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from trainkit.io.data.errors import BatchError, DataWarning, LoadError
from trainkit.io.data.loader import Loader
from trainkit.io.data.sources import TokenFile

WORKERS = [0, 2]


class TwoWords(Exception):
    """Cannot be made from one text."""

    def __init__(self, code: int, word: str) -> None:
        super().__init__(code, word)
        self.word = word


class Numbers(Dataset[torch.Tensor]):
    """Rows that do something at row 7."""

    def __init__(self, at_seven: Any = None) -> None:
        self.at_seven = at_seven

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> torch.Tensor:
        if row == 7 and self.at_seven is not None:
            self.at_seven()
        return torch.tensor(row)


class Endless(IterableDataset[int]):
    def __init__(self, at_seven: Any) -> None:
        self.at_seven = at_seven

    def __iter__(self) -> Any:
        for row in range(10**6):
            if row == 7:
                self.at_seven()
            yield row


def children() -> set[int]:
    """Live child processes of this one; zombies are counted as well, they were not reaped."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _no_orphans() -> Any:
    before = children()
    yield
    assert children() <= before


def raising(error: BaseException) -> Any:
    def at_seven() -> None:
        raise error

    return at_seven


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("error", [ValueError("bad pixel"), OSError(5, "disk"), KeyError("label"), RuntimeError("")])
def test_an_error_keeps_its_type_and_text_and_says_where(workers: int, error: Exception) -> None:
    loader = Loader(Numbers(raising(error)), batch_size=3, shuffle=False, workers=workers)
    batches = loader.epochs(2)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    began = time.monotonic()
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert time.monotonic() - began < 3
    where = "batch 2 (epoch 0, batch 2 of it), dataset index 7; dataset indices [6, 7, 8]"
    assert where in str(caught.value)
    assert str(error.args[0] if isinstance(error, KeyError) else error) in str(caught.value)
    # The two batches that were taken stay counted, the one that failed is not.
    assert loader.num_taken == 2


@pytest.mark.parametrize("workers", WORKERS)
def test_errors_that_cannot_be_made_again_are_named(workers: int) -> None:
    class Local(Exception):
        pass

    for error, kind in ((TwoWords(3, "gone"), "TwoWords"), (Local("here"), "Local"), (StopIteration("end"), "Stop")):
        with pytest.raises((LoadError, Local), match=r"dataset index 7") as caught:
            list(Loader(Numbers(raising(error)), batch_size=3, shuffle=False, workers=workers))
        assert kind in repr(caught.value)


def test_the_traceback_of_a_worker_is_told() -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        list(Loader(Numbers(raising(ValueError("bad"))), batch_size=3, workers=1))
    assert "__getitem__" in str(caught.value.__cause__)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_stream_says_in_which_batch(workers: int) -> None:
    batches = iter(Loader(Endless(raising(ValueError("bad"))), batch_size=3, shuffle=False, workers=workers))
    next(batches), next(batches)
    told = r"bad \(dataset index 7, in window 2 of epoch 0, from row 6 on; before batch 2 \(epoch 0, batch 2 of it\)"
    with pytest.raises(ValueError, match=told):
        next(batches)


def test_an_error_in_a_window_of_a_stream_names_its_row() -> None:
    def length(row: int) -> int:
        if row == 5:
            raise KeyError("no length")
        return 1

    for loader, row, told in (
        (Loader(Endless(raising(ValueError("bad"))), batch_size=2, window=4), 7, "bad"),
        (Loader(Endless(lambda: None), max_tokens=2, window=4, lengths=length), 5, "no length"),
    ):
        batches = iter(loader)
        next(batches), next(batches)
        place = rf"{told} \(dataset index {row}, in window 1 of epoch 0, from row 4 on; before batch 2"
        with pytest.raises((ValueError, KeyError), match=place):
            next(batches)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once() -> None:
    os._exit(3)


@pytest.mark.parametrize("end", [kill_self, exit_at_once])
@pytest.mark.parametrize("pool", [Numbers, Endless])
def test_a_killed_worker_ends_the_run_promptly(end: Any, pool: Any) -> None:
    loader = Loader(pool(end), batch_size=3, shuffle=False, workers=2 if pool is Numbers else 1)
    began = time.monotonic()
    with pytest.raises(LoadError, match="worker process of the loader ended"):
        list(loader.epochs(1))
    assert time.monotonic() - began < 8


def test_a_worker_killed_from_outside_ends_the_run_and_the_run_goes_on_later() -> None:
    loader = Loader(Numbers(), batch_size=2, workers=2, prefetch=1)
    whole = [batch.tolist() for batch in Loader(Numbers(), batch_size=2).epochs(2)]
    before = children()
    batches = loader.epochs(2)
    taken = [next(batches).tolist()]
    victim = min(children() - before)

    def go_on() -> None:
        os.kill(victim, signal.SIGKILL)
        taken.extend(batch.tolist() for batch in batches)

    # torch may notice the death before the loader asks for a batch.
    with pytest.raises(RuntimeError, match="worker"):
        go_on()
    batches.close()
    assert children() == before
    assert taken + [batch.tolist() for batch in loader.epochs(2)] == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_go_on_when_the_whole_group_is_told_to_stop(number: int) -> None:
    before = children()
    batches = Loader(Numbers(), batch_size=2, shuffle=False, workers=2, prefetch=1).epochs(1)
    rows = next(batches).tolist()
    for worker in children() - before:
        os.kill(worker, number)
    rows += [row for batch in batches for row in batch.tolist()]
    assert rows == list(range(20))


def sleep() -> None:
    time.sleep(600)


def test_closing_does_not_wait_for_a_worker_that_hangs() -> None:
    batches = Loader(Numbers(sleep), batch_size=2, shuffle=False, workers=2).epochs(1)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 4


def test_leaving_the_loop_ends_the_workers() -> None:
    before = children()
    for _ in Loader(Numbers(), batch_size=2, workers=2).epochs(3):
        assert len(children() - before) == 2
        break
    assert children() == before


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_loader_faults import Numbers, sleep
from trainkit.io.data.loader import Loader
batches = Loader(Numbers({hang}), batch_size=2, shuffle=False, workers=2).epochs(1)
next(batches)
print("ready", flush=True)
{end}
"""


def run_program(hang: str, end: str) -> subprocess.Popen[str]:
    code = PROGRAM.format(tests=str(Path(__file__).parent), hang=hang, end=end)
    root = str(Path(__file__).resolve().parents[3])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)


def descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["None", "sleep"])
def test_a_program_that_ends_without_closing_does_not_hang(hang: str) -> None:
    with run_program(hang, "raise SystemExit(5)") as program:
        assert program.wait(timeout=60) == 5


@pytest.mark.slow
def test_workers_of_a_killed_program_end() -> None:
    with run_program("None", "time.sleep(600)") as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        workers = descendants(program.pid)
        assert len(workers) == 2
        program.kill()
        program.wait()
        deadline = time.monotonic() + 15
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_alive, workers))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"x": 1}] * 4 + [{"y": 1}], "the keys ['x'], found ['y']"),
        ([{"x": 1}] * 4 + [{"x": 1, "y": 1}], "the keys ['x'], found ['x', 'y']"),
        ([{"x": 1}] * 4 + [{"x": 0.5}], "key 'x': expected int64 of shape (), found float32 of shape ()"),
        ([{"x": 1}] * 4 + [{"x": True}], "key 'x': expected int64 of shape (), found bool of shape ()"),
        ([{"x": 1}] * 4 + [{"x": "1"}], "key 'x': expected a tensor, array, number or list of numbers, found str"),
        ([{"x": 1}] * 4 + [{"x": None}], "key 'x': expected a tensor, array, number or list of numbers, found None"),
        ([{"x": 1}] * 4 + [{"x": 2**70}], "key 'x': expected integers of 64 bits"),
        ([{"x": [1, 2]}] * 4 + [{"x": [1]}], "key 'x': expected int64 of shape (2,), found int64 of shape (1,)"),
        ([{"x": [[1], [2]]}] * 4 + [{"x": [[1], []]}], "key 'x': expected numbers of equal shapes"),
        ([{"a": {"b": 1}}] * 4 + [{"a": {"c": 1}}], "key 'a': expected the keys ['b'], found ['c']"),
        ([{"a": {"b": 1}}] * 4 + [{"a": 1}], "key 'a': expected dict, found int"),
        ([(1, 2)] * 4 + [(1, 2, 3)], "expected the length 2, found 3"),
        ([(1, 2)] * 4 + [(1, 2.0)], "key '1': expected int64 of shape (), found float32 of shape ()"),
        ([torch.zeros(2)] * 4 + [torch.zeros(3)], "expected float32 of shape (2,), found float32 of shape (3,)"),
        ([torch.zeros(2)] * 4 + [torch.zeros(2).double()], "expected float32 of shape (2,), found float64"),
        ([torch.zeros(2)] * 4 + [None], "found None"),
        ([torch.zeros(2)] * 4 + [object()], "found object"),
    ],
)
def test_rows_that_differ_are_named(workers: int, rows: list[Any], told: str) -> None:
    loader = Loader([rows[0]] * 5 + rows + [rows[0]] * 2, batch_size=5, shuffle=False, workers=workers)
    batches = iter(loader)
    next(batches)
    with pytest.raises(BatchError, match=re.escape(told)) as caught:
        next(batches)
    assert "batch 1 (epoch 0, batch 1 of it), dataset index 9; dataset indices [5, 6, 7, 8, 9]" in str(caught.value)


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ({"y": torch.zeros(2)}, "expected float32 with 1 axes as in the first batch, found no such key"),
        ({"x": torch.zeros(2).long()}, "key ['x']: expected float32 with 1 axes as in the first batch, found int64"),
        ({"x": torch.zeros(2, 1)}, "found float32 with 2 axes"),
        ({"x": torch.zeros(2), "y": torch.zeros(2)}, "key ['y']: expected no such key"),
    ],
)
def test_a_batch_unlike_the_first_is_refused(later: dict[str, torch.Tensor], told: str) -> None:
    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return later if 4 in rows else {"x": torch.zeros(len(rows))}

    with pytest.raises(BatchError, match=re.escape(told)) as caught:
        list(Loader(list(range(8)), batch_size=2, shuffle=False, collate=collate))
    assert "batch 2 (epoch 0, batch 2 of it)" in str(caught.value)
    assert len(list(Loader(list(range(8)), batch_size=2, shuffle=False, collate=collate, uniform=False))) == 4


def test_a_collator_that_gives_no_tensors_is_refused() -> None:
    with pytest.raises(BatchError, match="collate: returned list without tensors"):
        next(iter(Loader([1, 2], batch_size=2, collate=lambda rows: rows)))


class Empty(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize("data", [[], torch.zeros(0, 3), {"x": torch.zeros(0)}])
def test_no_rows_are_refused_at_once(data: Any) -> None:
    with pytest.raises(ValueError, match="data: there are no rows"):
        Loader(data, batch_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_empty_stream_is_refused_before_the_first_batch(workers: int) -> None:
    with pytest.raises(ValueError, match="the stream gave no row in epoch 0"):
        next(iter(Loader(Empty(), batch_size=2, workers=workers)))


def test_too_few_rows_for_a_batch() -> None:
    with pytest.raises(ValueError, match="got 4 with drop_last for 3 rows, which make no batch"):
        Loader([1, 2, 3], batch_size=4, drop_last=True)
    with pytest.warns(DataWarning, match="3 rows do not fill batch_size=4") as caught:
        loader = Loader([1, 2, 3], batch_size=4)
    assert caught[0].filename == __file__
    assert [sorted(batch.tolist()) for batch in loader.epochs(2)] == [[1, 2, 3]] * 2


class Once(IterableDataset[int]):
    """Gives its rows in the first reading only."""

    def __init__(self, num_rows: int) -> None:
        self.left = list(range(num_rows))

    def __iter__(self) -> Any:
        while self.left:
            yield self.left.pop(0)


def test_a_stream_that_ends_early_is_told_of_once() -> None:
    loader = Loader(Once(5), batch_size=2, shuffle=False, batches=10)
    with pytest.warns(DataWarning, match="gave no row in epoch 1, and the run ends after 3 batches") as caught:
        assert len(list(loader)) == 3
    assert len(caught) == 1
    with pytest.warns(DataWarning, match="has only 1 rows; every batch has 1 rows and not batch_size=4"):
        assert len(list(Loader(Once(1), batch_size=4, shuffle=False))) == 1
    with pytest.raises(ValueError, match="no batch of 4 rows in epoch 0"):
        list(Loader(Once(1), batch_size=4, shuffle=False, drop_last=True))


def test_an_iterator_that_can_be_read_once_is_refused() -> None:
    with pytest.raises(TypeError, match="got generator, an iterator, which can be read only once"):
        Loader((row for row in range(3)), batch_size=1)
    with pytest.raises(TypeError, match="data: got int"):
        Loader(3, batch_size=1)


def test_token_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    with pytest.raises(FileNotFoundError, match=re.escape(str(file))):
        TokenFile(file, 2, dtype="uint16")
    for content, told in ((b"", "has 0 bytes"), (b"123", "has 3 bytes"), (b"12", "has 1 tokens; a row needs 3")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            TokenFile(file, 2, dtype="uint16")
    with pytest.raises(ValueError, match="does not say its own"):
        TokenFile(file, 2)
    with pytest.raises(TypeError, match="float16"):
        TokenFile(file, 1, dtype="float16", overlap=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": -1}, "workers: got -1"),
        ({"prefetch": 0}, "prefetch: got 0"),
        ({"rank": 2, "world": 2}, "rank: got 2 of world=2"),
        ({"world": 0}, "world: got 0"),
        ({"batches": -1}, "batches: got -1"),
        ({"seed": 2**64}, "seed: got"),
        ({"seed": 0.5}, "seed: got 0.5"),
        ({"lengths": [1, 2, 3]}, "lengths: expected max_tokens"),
        ({"group_by_length": True}, "lengths: max_tokens and group_by_length need"),
        ({"group_by_length": True, "lengths": [1, 2]}, "lengths: got shape"),
        ({"group_by_length": True, "lengths": [1, 2, -3]}, "lengths: got shape"),
        ({"batch_size": None, "max_tokens": 5, "lengths": [1, 9, 3]}, "the row with dataset index 1 has 9"),
        ({"window": 3}, "window: got 3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Loader([1, 2, 3], **{"batch_size": 2, **options})


def test_workers_of_an_iteration_in_a_cycle_end_when_it_is_collected() -> None:
    before = children()
    iterator = iter(Loader(Numbers(), batch_size=2, workers=1))
    next(iterator)
    cycle: list[Any] = [iterator]
    cycle.append(cycle)
    assert children() > before
    del iterator, cycle
    gc.collect()
    assert children() == before
