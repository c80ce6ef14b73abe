"""``python -m tests.docs.trainer_table`` writes the table of methods into docs/trainer.md.

The rows follow from ``tests/trainer/surface.py`` and the docstrings of the class; a test holds the page to them.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from tests.trainer.surface import METHODS, Method
from trainkit.trainer.trainer import Trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"
HEAD = ("| method | what it does | done in | an override is reached from |", "|---|---|---|---|")
# Of methods that are their one line, and of the constructor, whose text is the class's.
WITHOUT_DOCSTRING = {
    "__init__": "Check the arguments, place the model, make what the run needs.",
    "_save_optimizer_and_scheduler": "`optimizer.pt` and `scheduler.pt` of a checkpoint.",
    "_load_optimizer_and_scheduler": "Both, from a checkpoint.",
    "_load_rng_state": "The random state of a checkpoint.",
    "_save_scaler": "`scaler.pt`: the state of the loss scale of fp16.",
    "_load_scaler": "That state, from a checkpoint.",
    "_hp_search_setup": "Put the parameters of a trial into the arguments.",
    "_report_to_hp_search": "Tell the search what an evaluation gave, and stop a trial that it gives up.",
    "_move_model_to_device": "Move the model, unless a device map has placed it.",
    "_activate_neftune": "Add noise to the embeddings while training.",
    "_deactivate_neftune": "Take the noise away.",
    "_push_from_checkpoint": "Upload what `hub_strategy` names, in the background.",
    "_finish_current_push": "Wait for the upload under way.",
}


def member(name: str) -> object:
    """A method of the class as a function."""
    found = inspect.getattr_static(Trainer, name)
    return getattr(found, "__func__", getattr(found, "fget", found))


def summary(name: str) -> str:
    """The first paragraph of a docstring, on one line."""
    text = inspect.cleandoc(member(name).__doc__ or "").partition("\n\n")[0]
    return " ".join((text or WITHOUT_DOCSTRING[name]).split()).replace("``", "`").replace("|", r"\|")


def row(method: Method) -> str:
    path = "trainkit/" + method.room.replace(".", "/") + ".py"
    origin = "your code" if method.calls == "users" else method.calls
    text = re_role(summary(method.name))
    return f"| `{method.name}` | {text} | [{path.rpartition('/')[2]}](../{path}) | {origin} |"


def re_role(text: str) -> str:
    """``:meth:`x` `` as `` `x` ``."""
    for role in (":meth:", ":func:", ":class:"):
        text = text.replace(role, "")
    return text.replace("`~", "`")


def rows() -> list[str]:
    return [row(method) for method in METHODS]


def in_page() -> list[str]:
    """The rows that the page has now."""
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def written() -> Iterator[str]:
    """The lines of the page with the table as it should be, in the place of the old one."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD[0])
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    yield from lines[:start]
    yield from (*HEAD, *rows())
    yield from lines[end:]


if __name__ == "__main__":
    PAGE.write_text("\n".join(written()) + "\n", encoding="utf-8")
