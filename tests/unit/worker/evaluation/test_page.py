"""The report's page: whatever text a report holds, it stays text."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from loractl.worker.evaluation.report import render_html

from ....acceptance.test_report_page import report

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)></style></title><svg/onload=alert(1)>{{7*7}}"
WORDS = ("method", "reading")
"""Keys whose values, like the names of measures, are words of ours: another one is an error, not text on the page."""


class Page(HTMLParser):
    """Collects what runs or loads something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "object", "embed", "link", "base", "form", "a"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name.startswith("on") or name in ("href", "src", "srcdoc")]


def texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in the report a text stands."""
    if isinstance(value, str) and path[-1] not in WORDS and not (path[-1] == "name" and "metrics" in path):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from texts(inner, (*path, key))


@pytest.mark.parametrize("path", list(texts(report())), ids=lambda path: ".".join(map(str, path)))
def test_no_text_of_a_report_becomes_markup(path: tuple[Any, ...]) -> None:
    hostile = copy.deepcopy(report())
    place = hostile
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = EVIL
    page = Page()
    page.feed(render_html(hostile))
    assert page.found == []


def test_the_page_forbids_scripts_even_if_one_got_in() -> None:
    assert "default-src 'none'" in render_html(report()) and "script-src" not in render_html(report())


def test_the_loss_chart_is_legible_on_a_phone_and_names_its_axes_and_the_held_out_curve() -> None:
    value = copy.deepcopy(report())
    value["training"]["losses"] = [[step, 3 / step + 0.5] for step in range(1, 31)]
    value["training"]["eval_losses"] = [[step, 3 / step + 0.53] for step in range(10, 31, 10)]
    page = render_html(value)
    narrow = re.search(r'<svg class="narrow" viewBox="0 0 (\d+) (\d+)".*?</svg>', page, re.S)
    assert narrow and int(narrow[1]) <= 400, "its letters are as large as they say on 400 px"
    assert ">step<" in narrow[0] and ">loss<" in narrow[0] and ">held out<" in narrow[0] and 'class="held"' in narrow[0]
    places = [(float(x), float(y)) for x, y in re.findall(r'<text class="strong" x="([\d.]+)" y="([\d.]+)"', narrow[0])]
    assert len(places) == 2 and abs(places[0][1] - places[1][1]) >= 26, "the last values don't lie on each other"
    assert all(x < 400 - 30 for x, _ in places)
