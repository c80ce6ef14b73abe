"""Which checkpoints stay."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit import TrainState
from trainkit.io.checkpoint import CheckpointWarning, Manifest, Retention, Saver, checkpoints, latest, load, save
from trainkit.io.checkpoint.retention import kept

Make = Callable[..., TrainState]


def _made(step: int, counter: int, loss: float | None) -> Manifest:
    return Manifest(step, counter, "run", {}, {}, {} if loss is None else {"loss": loss})


@given(
    steps=st.lists(st.tuples(st.integers(0, 20), st.none() | st.integers(-3, 3)), max_size=8),
    last=st.none() | st.integers(1, 4),
    best=st.integers(0, 4),
    every=st.none() | st.integers(1, 5),
    mode=st.sampled_from(["min", "max"]),
)
def test_the_rules_keep_what_they_say(
    steps: list[tuple[int, int | None]], last: int | None, best: int, every: int | None, mode: str
) -> None:
    made = [_made(step, i, loss) for i, (step, loss) in enumerate(sorted(steps, key=lambda pair: pair[0]))]
    stay = kept(Retention(last=last, best=best, metric="loss", mode=mode, every=every), made)
    sign = 1 if mode == "min" else -1
    for i, one in enumerate(made):
        newer = len(made) - 1 - i
        loss = one.metrics.get("loss")
        better = [
            j
            for j, other in enumerate(made)
            if loss is not None and (o := other.metrics.get("loss")) is not None and (sign * o, -j) < (sign * loss, -i)
        ]
        wanted = (
            last is None
            or newer < last
            or (every is not None and one.step % every == 0)
            or (loss is not None and len(better) < best)
        )
        assert (i in stay) == wanted


def test_a_saver_keeps_the_last_the_best_and_every_kth(tmp_path: Path, make_state: Make) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 4.0, 7: 5.0}
    rules = Retention(last=2, best=1, metric="loss", every=4)
    with Saver(tmp_path, keep=rules) as saver:
        for step, loss in losses.items():
            saver.save(make_state(step), metrics=None if loss is None else {"loss": loss, "other": 1.0})
        with pytest.raises(ValueError, match=r"metrics: has \['accuracy'\], and not 'loss'"):
            saver.save(make_state(8), metrics={"accuracy": 1.0})
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 7)]
    # The rules see what was saved before the program was started again.
    with Saver(tmp_path, keep=rules, resumed_from=tmp_path / "checkpoint-7") as saver:
        saver.save(make_state(8), metrics={"loss": 0.5})
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (4, 7, 8)]


def test_the_new_one_stays_whatever_the_others_are_called(tmp_path: Path, make_state: Make) -> None:
    save(tmp_path, make_state(20), run_id="run")
    with Saver(tmp_path, keep=Retention(last=1), run_id="run") as saver:
        saver.save(make_state(15))
        assert saver.wait() == tmp_path / "checkpoint-15"
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]


def _names(folder: Path) -> list[str]:
    """What is in a folder of checkpoints, without the part of a name that is drawn."""
    names = (path.name for path in folder.iterdir() if path.name != ".lock")
    return sorted(re.sub("abandoned-[0-9a-f]{16}$", "abandoned", name) for name in names)


def _saved(folder: Path, make_state: Make, *steps: int) -> Path:
    """A folder with these checkpoints of one run."""
    for step in steps:
        save(folder, make_state(step), cursor={"first": step})
    return folder


def _gone_back(folder: Path, to: Path, keep: Retention) -> Saver:
    with pytest.warns(CheckpointWarning, match="its newer checkpoints are set aside and not removed") as told:
        saver = Saver(folder, keep=keep, resumed_from=to)
    assert len(told) == 1
    return saver


@pytest.mark.parametrize("last", [1, 2, None])
def test_a_run_that_goes_back_is_the_newest_at_once_and_the_rest_is_set_aside(
    last: int | None, tmp_path: Path, make_state: Make, bits: Callable[[TrainState], Any]
) -> None:
    _saved(tmp_path, make_state, 10, 20, 30)
    before = {step: bits(load(tmp_path / f"checkpoint-{step}", make_state()).state) for step in (20, 30)}
    start = tmp_path / "checkpoint-10"
    with _gone_back(tmp_path, start, Retention(last=last)) as saver:
        # Whatever ends the run now, it goes on from there.
        assert latest(tmp_path) == start
        for step in (15, 20):
            saver.save(make_state(step, key=99), cursor="second")
            saver.wait()
            assert latest(tmp_path) == tmp_path / f"checkpoint-{step}"
            assert start.exists() == (last is None or (step == 15 and last == 2))
    set_aside = ["checkpoint-20.abandoned", "checkpoint-30.abandoned"]
    own = {1: ["checkpoint-20"], 2: ["checkpoint-15", "checkpoint-20"]}.get(
        last or 0, ["checkpoint-10", "checkpoint-15", "checkpoint-20"]
    )
    assert _names(tmp_path) == sorted([*own, *set_aside])
    # The new one of the same step has not replaced the old one, which is whole, and can be gone on from.
    assert load(tmp_path / "checkpoint-20", make_state()).cursor == "second"
    for step, was in before.items():
        (old,) = tmp_path.glob(f"checkpoint-{step}.abandoned-*")
        restored = load(old, make_state())
        assert bits(restored.state) == was and restored.cursor == {"first": step}


def test_what_was_set_aside_can_be_gone_on_from_again(tmp_path: Path, make_state: Make) -> None:
    _saved(tmp_path, make_state, 10, 20)
    with _gone_back(tmp_path, tmp_path / "checkpoint-10", Retention(last=1)) as saver:
        saver.save(make_state(15))
    (old,) = tmp_path.glob("checkpoint-20.abandoned-*")
    # Newer than all that is there: nothing is set aside, and the rules remove what is older.
    with Saver(tmp_path, keep=Retention(last=1), resumed_from=old) as saver:
        saver.save(make_state(25))
    assert _names(tmp_path) == ["checkpoint-20.abandoned", "checkpoint-25"]


def test_a_run_that_goes_back_before_its_first_save_can_go_back_again(tmp_path: Path, make_state: Make) -> None:
    _saved(tmp_path, make_state, 10, 20, 30)
    with _gone_back(tmp_path, tmp_path / "checkpoint-20", Retention(last=1)):
        pass
    with _gone_back(tmp_path, tmp_path / "checkpoint-10", Retention(last=1)):
        pass
    with Saver(tmp_path, resumed_from=tmp_path / "checkpoint-10"):
        pass
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-20.abandoned", "checkpoint-30.abandoned"]


def test_a_copy_elsewhere_may_be_gone_back_to(tmp_path: Path, make_state: Make) -> None:
    folder = _saved(tmp_path / "run", make_state, 10, 20)
    copy = tmp_path / "copies" / "checkpoint-10"
    shutil.copytree(folder / "checkpoint-10", copy)
    shutil.rmtree(folder / "checkpoint-10")
    with _gone_back(folder, copy, Retention(last=1)) as saver:
        saver.save(make_state(12))
    assert _names(folder) == ["checkpoint-12", "checkpoint-20.abandoned"] and copy.exists()


def test_what_is_damaged_or_of_others_is_not_set_aside(tmp_path: Path, make_state: Make) -> None:
    _saved(tmp_path, make_state, 10, 20, 30)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-40").mkdir()
    _saved(tmp_path / "other", make_state, 50)
    shutil.copytree(tmp_path / "other" / "checkpoint-50", tmp_path / "checkpoint-50")
    with pytest.warns(CheckpointWarning, match="checkpoint-30 is checkpoint-30.abandoned-[0-9a-f]{16} now$"):
        saver = Saver(tmp_path, resumed_from=tmp_path / "checkpoint-10", overwrite=True)
    saver.close()
    assert _names(tmp_path) == sorted(
        ["checkpoint-10", "checkpoint-20", "checkpoint-30.abandoned", "checkpoint-40", "checkpoint-50", "other"]
    )


GOES_BACK = """
import itertools, json, os, shutil, sys, warnings
from pathlib import Path

import torch
from torch import nn

from trainkit import init_state
from trainkit.io.checkpoint import CheckpointWarning, Retention, Saver, latest, load
from trainkit.optim import sgd

torch.set_num_threads(1)
warnings.simplefilter("ignore", CheckpointWarning)
state = init_state(nn.Linear(2, 1), sgd(0.1))


def goes_back(folder, calls):
    def counted(call):
        def instead(*arguments, **options):
            nonlocal calls
            if calls == 0:
                os.kill(os.getpid(), 9)
            calls -= 1
            return call(*arguments, **options)

        return instead

    os.rename, os.fsync, os.unlink = counted(os.rename), counted(os.fsync), counted(os.unlink)
    found = load(folder / "checkpoint-10", like=state)
    with Saver(folder, keep=Retention(last=1), resumed_from=found.path) as saver:
        saver.save(state.replace(step=torch.tensor(15)), cursor="second")


def in_child(folder, calls):
    pid = os.fork()
    if pid == 0:
        try:
            goes_back(folder, calls)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


root = Path(sys.argv[1])
with Saver(root / "whole", keep=Retention(last=None)) as saver:
    for step in (10, 20, 30, 40):
        saver.save(state.replace(step=torch.tensor(step)))
for number in itertools.count():
    folder = root / str(number)
    shutil.copytree(root / "whole", folder)
    code = in_child(folder, number)
    row = [code, latest(folder).name, sorted(path.name for path in folder.iterdir())]
    # The same command once more; the start is gone where the new one is there.
    if row[1] != "checkpoint-15":
        row += [in_child(folder, -1), latest(folder).name]
    print(json.dumps(row), flush=True)
    if code == 0:
        break
"""


def test_a_kill_while_a_run_goes_back_loses_nothing(tmp_path: Path) -> None:
    """Killed before each call that changes or flushes names, until it comes through."""
    command = [sys.executable, "-c", GOES_BACK, str(tmp_path)]
    rows = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    newest = []
    for row in rows:
        code, found, names, *again = json.loads(row)
        newest.append(found)
        kept_names = {name.split(".abandoned-")[0] for name in names}
        assert kept_names >= {"checkpoint-20", "checkpoint-30", "checkpoint-40"}
        assert found == "checkpoint-15" or "checkpoint-10" in names
        assert code == (0 if row is rows[-1] else -9)
        assert again == ([] if found == "checkpoint-15" else [0, "checkpoint-15"])
    # First as if nothing had happened, then the start, then the new one.
    assert list(dict.fromkeys(newest)) == ["checkpoint-40", "checkpoint-10", "checkpoint-15"]


def test_other_runs_and_other_files_are_not_touched(tmp_path: Path, make_state: Make) -> None:
    with Saver(tmp_path, keep=Retention(last=1)) as saver:
        saver.save(make_state(1))
        saver.wait()
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        saver.save(make_state(2))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint-2", "checkpoint-3", "notes.txt"}
