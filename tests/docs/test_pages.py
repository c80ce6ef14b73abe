"""What the pages promise: short programs, every room on the map, tables that are the code's."""

import inspect
import re
from pathlib import Path

import pytest

import trainkit.optim
from trainkit.optim import Transform

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "limit"), [("README.md", 20), ("docs/gan.md", 30), ("docs/sam.md", 30)])
def test_the_program_of_the_page_is_short(page: str, limit: int) -> None:
    first, *_ = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len([line for line in first.splitlines() if line.strip()]) <= limit
    assert not re.search(r"^\s*class ", first, re.MULTILINE), "nothing needs to be subclassed"


def test_every_room_is_on_the_map_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {target.rstrip("/") for target in re.findall(r"\]\(([^)#\s]+)", text)}
    files = [f"trainkit/{file.name}" for file in (ROOT / "trainkit").glob("*.py") if not file.name.startswith("_")]
    folders = [f"trainkit/{file.parent.name}" for file in (ROOT / "trainkit").glob("*/__init__.py")]
    rooms = {*files, *folders, "recipes", "benchmarks", "tests", "tests/test_laws.py"}
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert not sorted((rooms | pages) - linked)


def plain(text: str) -> str:
    """A docstring's text in Markdown, on one line."""
    text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", r"\|")


def row(name: str) -> str:
    doc = inspect.getdoc(getattr(trainkit.optim, name)) or ""
    summary, _, rest = doc.partition("\n\n")
    source = re.search(r"Source: (.*?)(?:\n\n|\Z)", rest, re.DOTALL)
    return f"| `{name}` | {plain(summary)} | {plain(source[1]) if source else ''} |"


def test_the_table_of_transformations_is_what_the_docstrings_say() -> None:
    functions = [name for name, value in vars(trainkit.optim).items() if inspect.isfunction(value)]
    returned = {name: inspect.signature(getattr(trainkit.optim, name)).return_annotation for name in functions}
    expected = [row(name) for name in sorted(functions) if returned[name] in ("Transform", Transform)]
    assert len(expected) > 20
    page = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    found = [line for line in page.splitlines() if line.startswith("| `")]
    assert found == expected, "the rows should be:\n" + "\n".join(expected)
