"""The built site in a browser: pages that people read fit a phone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..browser import CHROMIUM, browser

ROOT = Path(__file__).parents[2]
PAGES = ("index", "jobs", "results", "serving", "deploy", "architecture", "common-changes")
WIDER = """[...document.querySelectorAll("article table")].filter(one => {
  const room = one.closest(".md-typeset__scrollwrap") ?? one.parentElement;
  return one.scrollWidth > room.clientWidth || one.getBoundingClientRect().right > document.documentElement.clientWidth;
}).map(one => one.textContent.trim().slice(0, 40))"""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_table_of_words_is_wider_than_a_phone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "build.py", tmp_path], check=True, capture_output=True)
    with browser() as one:
        one.size(400)
        found = {}
        for page in PAGES:
            one.open((tmp_path / "site" / f"{page}.html").as_uri())
            assert one.value("document.querySelectorAll('article h1').length") == 1
            found[page] = one.value(WIDER)
    assert found == {page: [] for page in PAGES}
