"""The methods of the Trainer and their signatures, beside transformers 4.57."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import transformers

import trainkit
from tests.trainer.surface import COMPANIONS, METHODS
from trainkit.trainer.trainer import Trainer

ROOT = Path(trainkit.__file__).parent


def test_there_are_74_methods() -> None:
    assert len(METHODS) == 74
    assert len({method.name for method in METHODS}) == 74


def parameters(cls: type, name: str) -> list[tuple[str, Any]]:
    member = inspect.getattr_static(cls, name)
    if isinstance(member, property):
        return [("property", member.fset is not None)]
    fn = member.__func__ if isinstance(member, staticmethod) else inspect.unwrap(member)
    kind = "static" if isinstance(member, staticmethod) else "method"
    found = inspect.signature(fn).parameters.values()
    return [(kind, None), *((p.name, (p.kind, p.default)) for p in found)]


@pytest.mark.parametrize("name", [method.name for method in METHODS] + list(COMPANIONS))
def test_signatures_are_those_of_transformers(name: str) -> None:
    theirs = parameters(transformers.Trainer, name)
    ours = parameters(Trainer, name)
    if name == "__init__":
        # There the old name comes through a decorator.
        assert ours[-1][0] == "tokenizer"
        ours = ours[:-1]
    assert [p for p, _ in ours[1:]] == [p for p, _ in theirs[1:]]
    defaults = [(p, v) for (p, v), (_, w) in zip(ours[1:], theirs[1:], strict=True) if v != w and str(v) != str(w)]
    assert not defaults


def test_every_method_is_the_classes_own_and_has_a_docstring_or_is_short() -> None:
    for method in METHODS:
        member = inspect.getattr_static(Trainer, method.name)
        assert method.name in vars(Trainer)
        fn = getattr(member, "__func__", getattr(member, "fget", member))
        lines = len(inspect.getsource(fn).splitlines())
        assert inspect.getdoc(fn) or lines < 12, method.name


def test_the_class_is_thin() -> None:
    assert len((ROOT / "trainer" / "trainer.py").read_text().splitlines()) <= 930


@pytest.mark.parametrize("room", sorted({method.room for method in METHODS}))
def test_every_room_exists(room: str) -> None:
    assert (ROOT / (room.replace(".", "/") + ".py")).is_file()
