"""The pages stay true: their Python blocks run, their relative links lead somewhere."""

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block that cannot run says why: ```python skip: needs eight GPUs
BLOCK = re.compile(r"^```python *(?P<note>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ +(?P<text>.+)$", re.MULTILINE)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to, by the rule of common Markdown hosts."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    cleaned = (re.sub(r"[^\w\- ]", "", match["text"].strip().lower()) for match in HEADING.finditer(text))
    return {heading.replace(" ", "-") for heading in cleaned}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    # Dataclasses look up the module that they are defined in.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.finditer(text):
        if block["note"]:
            assert re.fullmatch(r"skip: \S.*", block["note"]), f"{page_name(page)}: a block says {block['note']!r}"
            continue
        # Empty lines in front, so that a traceback has the line of the page.
        lines_before = text[: block.start("code")].count("\n")
        exec(compile("\n" * lines_before + block["code"], str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.finditer(FENCED.sub("", page.read_text(encoding="utf-8"))):
        address, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", address):
            continue
        target = (page.parent / address).resolve() if address else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link["target"])
    assert not broken
