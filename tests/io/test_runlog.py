import json
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from trainkit.io.runlog import JsonLines, MetricWindow, describe_folder, plot_curves, read_jsonl
from trainkit.metrics import Mean


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with JsonLines(path) as log:
        log.write(step=1, loss=torch.tensor(0.5, dtype=torch.float64), name="a")
        log.write(step=2, tokens=torch.tensor(7))
    assert read_jsonl(path) == [{"step": 1, "loss": 0.5, "name": "a"}, {"step": 2, "tokens": 7}]


def test_a_row_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write(step=1)
        assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'


def test_a_second_run_replaces_the_file(tmp_path: Path) -> None:
    for step in (1, 2):
        with JsonLines(tmp_path / "m.jsonl") as log:
            log.write(step=step)
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 2}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_json_lacks_are_valid_json_and_keep_their_name(tmp_path: Path, value: float) -> None:
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write(loss=torch.tensor(value))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"loss": str(value)}


def test_the_file_is_closed_after_an_error(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(KeyError), log:
        raise KeyError
    with pytest.raises(ValueError, match="closed file"):
        log.write(step=1)


def test_a_picture_shows_the_named_curves(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 8.0},
        {"step": 1, "validation": 7.0},
        {"step": 2, "loss": "nan"},
        {"step": 3, "loss": 2.0},
    ]
    plot_curves(rows, tmp_path / "both.png", {"loss": "training", "validation": "held out"}, y_label="bits")
    plot_curves(rows, tmp_path / "one.png", {"loss": "training"}, y_label="bits")
    both, one = (matplotlib.image.imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape == one.shape == (540, 960, 4)
    orange = (abs(both[..., :3] - [1.0, 0.498, 0.055]) < 0.02).all(-1).sum()
    assert orange > (abs(one[..., :3] - [1.0, 0.498, 0.055]) < 0.02).all(-1).sum() == 0


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'trainkit\[recipes\]'"):
        plot_curves([], tmp_path / "loss.png", {}, y_label="bits")


def test_a_folder_is_described_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(1025))
    (tmp_path / "longer.txt").write_bytes(b"")
    assert describe_folder(tmp_path, {"a.bin": "weights", "longer.txt": "nothing"}).splitlines() == [
        str(tmp_path),
        "  a.bin           2 KiB  weights",
        "  longer.txt      0 KiB  nothing",
    ]


def test_a_file_that_is_not_there_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.bin"):
        describe_folder(tmp_path, {"a.bin": "weights"})


def test_a_resumed_run_keeps_the_rows_up_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as log:
        for step in (1, 2, 3):
            log.write(step=step)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    with JsonLines(path, until=2) as log:
        log.write(step=3, again=True)
        log.sync()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    with JsonLines(tmp_path / "new.jsonl", until=7) as log:
        log.write(step=8)
    assert read_jsonl(tmp_path / "new.jsonl") == [{"step": 8}]


def test_a_window_goes_on_exactly_and_misses_what_does_not_come_again() -> None:
    def mean(total: float, dtype: torch.dtype) -> Mean:
        return Mean(torch.tensor(total, dtype=dtype), torch.tensor(3))

    whole, first = MetricWindow(), MetricWindow()
    for window in (whole, first):
        window.add({"a": mean(0.1, torch.float32), "b": mean(1 / 3, torch.float64)})
    resumed = MetricWindow(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict()
    for window in (whole, resumed):
        window.add({"a": mean(0.7, torch.float32), "b": mean(1 / 7, torch.float64)})
    assert resumed.read() == whole.read()
    missing = MetricWindow(first.state_dict())
    missing.add({"a": mean(0.1, torch.float32)})
    with pytest.raises(ValueError, match=r"metrics: \['b'\] of the saved window did not come again"):
        missing.read()
