"""docs/trainer.md has the methods that the class has, in its words; docs/differences.md says the same of every line."""

import re
from pathlib import Path

from tests.docs import trainer_table
from tests.trainer.surface import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_of_methods_is_what_the_class_says() -> None:
    assert trainer_table.in_page() == trainer_table.rows(), "run: python -m tests.docs.trainer_table"


def test_only_methods_without_a_docstring_are_described_beside_it() -> None:
    bare = {method.name for method in METHODS if not getattr(trainer_table.member(method.name), "__doc__", None)}
    assert bare == set(trainer_table.WITHOUT_DOCSTRING)


def test_every_difference_says_both_behaviours_and_how_to_get_the_old_one() -> None:
    lines = [line for line in (DOCS / "differences.md").read_text(encoding="utf-8").splitlines() if line[:2] == "- "]
    assert len(lines) > 100
    # What 4.57 does, what trainkit does, and how to get the former.
    whole = re.compile(r"- 4\.57.*(;|\.) .*[Tt]rainkit.* Old behaviour: .*\.")
    assert not [line for line in lines if not whole.fullmatch(line)]
    assert len(set(lines)) == len(lines)
