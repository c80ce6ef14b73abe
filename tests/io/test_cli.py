import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainkit.io.cli import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a test."""

    steps: int = 1000
    """Number of updates."""
    folder: Path = Path("runs")
    """Where results go."""
    tie_weights: bool = False
    """Share weights."""


def test_options_are_the_fields_with_their_types() -> None:
    parsed = parse(Options, args=["--steps", "3", "--folder", "a/b", "--tie-weights"])
    assert parsed == Options(steps=3, folder=Path("a/b"), tie_weights=True)


def test_without_options_the_defaults_hold() -> None:
    assert parse(Options, args=[]) == Options()


def test_help_shows_the_sentence_of_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Options, description="What it does.", args=["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for text in ("What it does.", "--steps INT", "Number of updates.", "--folder PATH", "Where results go.", "1000"):
        assert text in shown


@pytest.mark.parametrize("args", [["--stepz", "3"], ["--steps", "many"]])
def test_an_option_that_does_not_fit_is_explained(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Options, args=args)
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_without_tyro_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(ImportError, match=r"pip install 'trainkit\[recipes\]'"):
        parse(Options, args=[])
