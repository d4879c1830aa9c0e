"""`loractl web` as a person meets it: the command, and its pages in a real Chromium."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text

from loractl.common.store.database import make_engine

from .. import webs
from ..browser import CHROMIUM, Browser, browser
from ..conftest import Cli

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

VIEWS = ("/", "/jobs", "/jobs/11", "/jobs/12", "/jobs/17", "/sweeps", "/sweeps/1", "/adapters", "/adapters?adapter=7",
         "/usage", "/usage?by=card&days=1")  # fmt: skip


@dataclass(frozen=True)
class RunningWeb:
    """A lab and the address of its page."""

    lab: webs.SeededLab
    url: str
    address: str


@pytest.fixture(scope="module")
def running_web(sqlite_template: Path) -> Iterator[RunningWeb]:
    """The installed command on a home with jobs."""
    home = Path(tempfile.mkdtemp(prefix="loractl-"))
    shutil.copy(sqlite_template, home / "loractl.db")
    url = f"sqlite:///{home / 'loractl.db'}"
    lab = webs.seed(url, home / "artifacts")
    command = Cli({"PATH": "/usr/bin:/bin", "LORACTL_HOME": str(home), "LORACTL_USER": "tester"}).start(
        "web", "--port", "0"
    )
    try:
        assert command.stdout is not None
        line = command.stdout.readline()
        found = re.match(r"The lab's page: (http://localhost:\d+)/  \(read-only", line)
        assert found is not None, line
        yield RunningWeb(lab=lab, url=url, address=found[1])
    finally:
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=20)
        shutil.rmtree(home, ignore_errors=True)
    assert command.returncode in (0, 130, -signal.SIGINT)


def test_the_command_serves_and_leaves_the_database_as_it_is(running_web: RunningWeb) -> None:
    def rows() -> list[tuple[object, ...]]:
        engine = make_engine(running_web.url)
        with engine.connect() as connection:
            found = [tuple(row) for row in connection.execute(text("SELECT job_id, status, step FROM jobs"))]
        engine.dispose()
        return found

    before = rows()
    for view in (*VIEWS, "/metrics"):
        with urllib.request.urlopen(running_web.address + view, timeout=20) as answer:
            assert answer.status == 200 and "server" not in answer.headers
    assert rows() == before


@pytest.mark.cold
def test_no_other_command_loads_the_web_s_packages() -> None:
    script = (
        "import sys; from click.testing import CliRunner; from loractl.scheduler.cli.main import cli, COMMANDS\n"
        "for args in (['--help'], ['status', '--help'], ['web', '--help']):\n"
        "    assert CliRunner().invoke(cli, args).exit_code == 0\n"
        "print(sorted({'starlette', 'uvicorn', 'jinja2', 'prometheus_client', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        started.size(1280)
        started.colours("light")
        yield started


@pytest.fixture
def page(chromium: Browser) -> Iterator[Browser]:
    """A browser that has not complained of anything."""
    chromium.requests.clear()
    chromium.complaints.clear()
    yield chromium
    chromium.size(1280)
    chromium.colours("light")
    chromium.scripts(on=True)


CONTRAST = """(() => {
  const shade = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
  const part = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg, .vh, .skip, [hidden]") || !element.checkVisibility()) continue;
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    let under = element, ground = [0, 0, 0, 0];
    for (; under && !ground[3]; under = under.parentElement) ground = shade(getComputedStyle(under).backgroundColor);
    const a = light(shade(getComputedStyle(element).color)), b = light(ground);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${element.className} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
  }
  return poor; })()"""
"""Texts that stand out too little from what is behind them (WCAG 2.2 AA)."""


@needs_chromium
def test_a_browser_finds_nothing_to_complain_of(running_web: RunningWeb, page: Browser) -> None:
    for view in VIEWS:
        page.open(running_web.address + view)
        for width, scheme in itertools.product((1280, 400), ("light", "dark")):
            page.size(width)
            page.colours(scheme)
            assert page.value("document.documentElement.scrollWidth") <= width, f"{view} is wider than {width} px"
            assert page.value(CONTRAST) == [], (view, scheme)
    assert page.complaints == []
    foreign = [url for url in page.requests if not url.startswith(running_web.address)]
    assert foreign == []


OVER = """[...document.querySelectorAll("main .panel *, main .stats *")].filter((e) =>
  !e.closest("svg, .log, .vh, .memory") && e.checkVisibility()).filter((e) => {
    const text = document.createRange(); text.selectNodeContents(e);
    const panel = e.closest(".panel, .stats div, .stats");
    return text.getBoundingClientRect().right > panel.getBoundingClientRect().right; })
  .map((e) => e.className + " " + e.textContent.slice(0, 30))"""
"""What is wider than its panel, which cuts it."""

LONELY = """[...document.querySelectorAll("main td, main .load")].filter((e) =>
  e.checkVisibility() && ["–", "·", "?"].includes(e.innerText.trim())).length"""
"""Cells that say nothing but that there is no value."""


@pytest.mark.long
@needs_chromium
def test_nothing_runs_over_its_panel_and_a_phone_shows_no_empty_cell(running_web: RunningWeb, page: Browser) -> None:
    engine = make_engine(running_web.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE attempts SET reason = 'host_out_of_memory' WHERE job_id = 10"))
    engine.dispose()
    for width in (1280, 1200, 1041, 400):
        page.size(width)
        for view in (*VIEWS, "/jobs/10", "/jobs/15"):
            page.open(running_web.address + view)
            assert page.value(OVER) == [], (width, view)
            assert width > 400 or page.value(LONELY) == 0, view


LABELS = """[...document.querySelectorAll(".bar svg text")].filter((label) => label.checkVisibility()).map((label) => {
  const at = (element) => element.getBoundingClientRect();
  return [label.textContent, at(label).right <= at(label.parentElement.querySelector("rect")).right]; })"""
"""The labels of bars that are shown, each with whether its part has room for it."""


@pytest.mark.long
@needs_chromium
def test_a_broader_bar_has_longer_labels_and_none_leaves_its_part(running_web: RunningWeb, page: Browser) -> None:
    shown: dict[int, list[str]] = {}
    for width in (1280, 1041, 400, 320):
        page.size(width)
        page.open(running_web.address + "/")
        found = page.value(LABELS)
        assert all(fits for _, fits in found), (width, found)
        shown[width] = [label for label, _ in found]
    assert any("priya · " in label for label in shown[1280])
    assert sum(map(len, shown[1280])) > sum(map(len, shown[320])) and len(shown[1280]) >= len(shown[320]) > 4


@pytest.mark.long
@needs_chromium
def test_a_refresh_swaps_what_changed_and_keeps_what_a_person_does(running_web: RunningWeb, page: Browser) -> None:
    page.open(running_web.address + "/jobs/12")
    page.value("document.querySelector('#h-log').closest('section').querySelector('a').focus()")
    page.value("document.querySelector('details').open = true; document.getElementById('q').value = 'typed'; 0")
    page.value("scrollTo(0, 400); window.mark = document.getElementById('h-log'); 0")
    engine = make_engine(running_web.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET step = 1234 WHERE job_id = 12"))
    engine.dispose()
    wait = "document.dispatchEvent(new Event('loractl-look')), document.body.innerText.includes('step 1 234 of')"
    page.wait(wait)
    assert page.value("document.activeElement.textContent") == "the whole log as text"
    assert page.value("scrollY") == 400 and page.value("document.querySelector('details').open")
    assert page.value("document.getElementById('q').value") == "typed"
    assert page.value("window.mark === document.getElementById('h-log')"), "what did not change is not replaced"
    assert page.complaints == []


@pytest.mark.long
@needs_chromium
def test_two_hundred_refreshes_leave_nothing_behind(running_web: RunningWeb, page: Browser) -> None:
    page.open(running_web.address + "/")
    page.call("Performance.enable")
    script = """(async () => { for (let n = 0; n < %d; n++) {
      history.replaceState(null, "", n %% 2 ? "/" : "/sweeps"); const before = document.title;
      document.dispatchEvent(new Event("loractl-look"));
      for (let t = 0; t < 400 && document.title === before; t++) await new Promise((done) => setTimeout(done, 5)); }
      return document.querySelectorAll("*").length; })()"""

    def counted() -> dict[str, float]:
        page.call("HeapProfiler.collectGarbage")
        metrics = page.call("Performance.getMetrics")["metrics"]
        return {m["name"]: m["value"] for m in metrics}

    def grown() -> dict[str, float]:
        """By how much a page that was refreshed is larger than a new one."""
        page.value(script % 20)
        first = counted()
        elements = page.value(script % 180)
        last = counted()
        page.open(running_web.address + "/")
        new = page.value('document.querySelectorAll("*").length')
        assert last["Nodes"] <= first["Nodes"] * 1.05
        assert last["JSHeapUsedSize"] < first["JSHeapUsedSize"] * 1.2
        return {"elements": elements - new, "listeners": last["JSEventListeners"] - counted()["JSEventListeners"]}

    none = {"elements": 0, "listeners": 0}
    assert grown() == none or grown() == none, "twice: an age may come to be said in other words between the two pages"
    assert page.complaints == []


@pytest.mark.long
@needs_chromium
def test_without_scripts_everything_can_be_read(running_web: RunningWeb, page: Browser) -> None:
    page.scripts(on=False)
    page.open(running_web.address + "/jobs/11")
    document = page.value("document.documentElement.outerHTML")
    assert "triage-long" in document and "Better than the base" in document
    assert page.value("document.getElementById('live').hidden && !document.querySelector('.copy:not([hidden])')"), (
        "what could do nothing is not shown"
    )
    assert page.value(CONTRAST) == []


@pytest.mark.long
@needs_chromium
def test_the_keyboard_reaches_everything(running_web: RunningWeb, page: Browser) -> None:
    page.open(running_web.address + "/")
    page.key("Tab")
    assert page.value("document.activeElement.textContent") == "Skip to content"
    page.key("/")
    assert page.value("document.activeElement.id") == "q"
    reached = "[...document.querySelectorAll('main a, main button:not([hidden])')].every((e) => e.tabIndex >= 0)"
    assert page.value(reached)
    assert page.value("[...document.querySelectorAll('main section, nav, form')].every((e) => e.ariaLabel || "
                      "e.getAttribute('aria-labelledby') || e.role || e.dataset.key)")  # fmt: skip


@pytest.mark.long
@needs_chromium
def test_what_people_typed_runs_nothing(running_web: RunningWeb, page: Browser) -> None:
    engine = make_engine(running_web.url)
    with engine.begin() as connection:
        quoted = EVIL.replace("'", "''").replace(":", "\\:")
        connection.execute(text(f"UPDATE jobs SET name = '{quoted}', message = '{quoted}' WHERE job_id IN (9, 12, 17)"))
        connection.execute(text(f"UPDATE log_chunks SET text = '{quoted}' WHERE job_id = 12"))
    engine.dispose()
    for view in ("/", "/jobs", "/jobs/12", "/jobs/9"):
        page.open(running_web.address + view)
        page.value("document.dispatchEvent(new Event('loractl-look')); 0")
        page.wait("document.body.innerText.includes('<img src=x onerror=')")
        assert page.value("document.title") != "owned" and page.value("document.images.length") == 0
    assert page.complaints == []
