"""Which checkpoints stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit import TrainState
from trainkit.io.checkpoint import Manifest, Retention, Saver, checkpoints, save
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
    first = save(tmp_path, make_state(10))
    with Saver(tmp_path, keep=Retention(last=1), resumed_from=first) as saver:
        saver.save(make_state(15))
        assert saver.wait() == tmp_path / "checkpoint-15"
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]


def test_other_runs_and_other_files_are_not_touched(tmp_path: Path, make_state: Make) -> None:
    with Saver(tmp_path, keep=Retention(last=1)) as saver:
        saver.save(make_state(1))
        saver.wait()
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        saver.save(make_state(2))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint-2", "checkpoint-3", "notes.txt"}
