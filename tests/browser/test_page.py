"""The report in a real browser: nothing is asked of the network, nothing overlaps or leaves the picture, on a phone and on a desk,
light and dark; it prints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from evaluate import made_up

from mobe_gguf.evaluate.page import write

from .chromium import PROGRAM, Browser, Page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium: apt-get install chromium")

#: Pairs of texts of one picture that overlap, and texts that leave it.
OVERLAPS = """
(() => {
  const wrong = [];
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, r], i) => {
      if (r.left < frame.left - 0.5 || r.right > frame.right + 0.5 || r.top < frame.top - 0.5 || r.bottom > frame.bottom + 0.5)
        wrong.push(['leaves the picture', a]);
      for (const [b, s] of texts.slice(0, i))
        if (r.left < s.right - 1 && s.left < r.right - 1 && r.top < s.bottom - 2.5 && s.top < r.bottom - 2.5) wrong.push([a, b]);
    });
  }
  return wrong;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(made_up.page(), path)
    with Browser() as browser:
        yield browser.open(path.as_uri(), 360)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 360, 700, 1280])
def test_it_is_readable(page: Page, width: int, dark: bool) -> None:
    page.look(width, dark)
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.ask(OVERLAPS) == []
    assert (
        page.ask("[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width).length")
        == 4
    )
    back = page.ask("getComputedStyle(document.body).backgroundColor")
    ink = page.ask("getComputedStyle(document.body).color")
    first = [int(x.strip("rgb() ").split(",")[0]) for x in (back, ink)]
    assert first[0] < 60 < 180 < first[1] if dark else first[1] < 60 < 180 < first[0]
    scales = page.ask(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width).filter(x => x)"
    )
    assert all(0.85 <= scale <= 1.1 for scale in scales), "text is as large on a phone as elsewhere"
    assert page.requests == [] and page.errors == []


def test_the_check_of_labels_sees_what_is_wrong(page: Page) -> None:
    page.look(360, False)
    move = "(t => { t.setAttribute('x', %s); })([...document.querySelectorAll('.narrow svg text.label')][0])"
    before = page.ask("document.querySelector('.narrow svg text.label').getAttribute('x')")
    page.ask(move % "1000")
    assert page.ask(OVERLAPS)
    page.ask(move % f"'{before}'")
    assert page.ask(OVERLAPS) == []


def test_names_do_nothing(page: Page) -> None:
    assert page.ask("document.querySelectorAll('script').length") == 0
    assert "<script>alert('x')</script>" in page.ask("document.querySelector('h1').textContent")


def test_it_prints(page: Page) -> None:
    data = page.pdf()
    assert data.startswith(b"%PDF") and len(data) > 20_000
    page.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    try:
        assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        hidden = "[...document.querySelectorAll('details td')].filter(t => !t.checkVisibility({contentVisibilityAuto: true})).length"
        assert page.ask("document.querySelectorAll('details td').length") > 0 and page.ask(hidden) == 0
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
