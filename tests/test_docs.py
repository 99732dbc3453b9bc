"""The pages that come out of the program are up to date, and what the others name exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_up_to_date():
    outputs = runpy.run_path(str(ROOT / "docs" / "generate.py"))["outputs"]()
    stale = [path.name for path, text in outputs.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"stale: {', '.join(stale)}; run python docs/generate.py"


def test_what_to_touch_is_where_it_is_said_to_be():
    """Names in backquotes of docs/architecture.md, each in the file that is named next to it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## What to touch")[1]
    pairs = re.findall(r"`(\w+)`(?: \w+){0,4}?\s(?:in|of)\s`(mobe_gguf/[\w/]+\.py)`", text.replace("\n", " "))
    assert {name for name, _ in pairs} >= {
        "FAMILIES",
        "VALUES",
        "KNOWN",
        "Method",
        "COMMANDS",
        "LLAMA_CPP",
    }
    for name, path in pairs:
        found = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(class |def )?{name}\b", found, re.MULTILINE), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    """Relative links of Markdown, and paths of this repository in backquotes."""
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    tops = "mobe_gguf|native|patches|tests|docs|models|bench"
    for path in re.findall(rf"`((?:{tops})/[^`\s*{{<]*)`", text):
        if not (ROOT / path).exists():
            missing.append(path)
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"
