"""What nobody would ask a page for, or a server under it would do: each is answered with a sentence and no trace."""

from __future__ import annotations

import gc
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from loractl.common.store.store import JobVerbs
from loractl.scheduler.web.pages import pages
from loractl.scheduler.web.pages.floor import lab_floor

from .conftest import PAGES, Web
from .test_guard import EVIL

TEXTS = ("/jobs/11/log", "/metrics")

ODD = (
    "/jobs/0", f"/jobs/{'9' * 3900}", "/jobs/2147483648", "/sweeps/0", "/sweeps/9223372036854775808",
    f"/sweeps/{'9' * 3900}", f"/jobs/{'9' * 300}/log", "/jobs/-1", "/jobs/1e3", "/jobs/٣",
    "/static/../site.py", "/static/..%2f..%2fsite.py", "/static/%2e%2e/page.jinja", "/static//etc/passwd",
    "/static/page.css%00.js", "/static/lab.jinja", "/%00", "/jobs/%00", "//evil.example/jobs", "/jobs/11;x=1",
    "/JOBS", "/jobs/", "/.git/config", "/web-token",
)  # fmt: skip
WORDS = (
    "%00",
    "%ed%a0%80",
    "' OR 1=1 --",
    "a%25_b",
    "=",
    "\"'=x",
    "$.a[0]=x",
    "a.b=c",
    "%0d%0aSet-Cookie:x",
    "9" * 3000,
)
NUMBERS = ("%00", "9" * 3000, "-1", "0", "1e9", "٣")
ASKED = {
    "/jobs": {"user": WORDS, "name": WORDS, "label": WORDS, "status": WORDS[:3], "after": NUMBERS},
    "/": {"label": WORDS[4:8], "after": NUMBERS[1:3]},
    "/jobs/11": {"answers": WORDS[:3], "from": NUMBERS},
    "/adapters": {"after": NUMBERS[:2], "adapter": NUMBERS[:2]},
    "/find": {"q": WORDS},
}


@pytest.fixture(scope="module", autouse=True)
def no_tasks_of_others() -> None:
    """asyncio reports tasks that nobody awaited once they are collected: those of other files before ours begin."""
    gc.collect()


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Every error that was logged: by the site itself, or for a task that nobody awaited."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("address", ODD)
def test_an_address_at_which_nothing_is_says_so(web: Web, address: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = web.client.get(f"http://localhost{address}", follow_redirects=False)
    assert answer.status_code in (307, 404), (address, answer.status_code)
    assert len(answer.text) < 6000 and "Traceback" not in answer.text
    assert faults(caplog) == []


def test_odd_parameters_are_a_sentence_from_either_database(
    any_web: Web, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", -1.0)
    web = any_web
    for page, keys in ASKED.items():
        for key, values in keys.items():
            for value in values:
                answer = web.client.get(f"{page}?{key}={value}", follow_redirects=False)
                assert answer.status_code in (200, 303, 400, 404), (page, key, value, answer.text[-900:])
                assert "\r" not in answer.headers.get("location", "") and "set-cookie" not in answer.headers
    assert faults(caplog) == []


@pytest.mark.parametrize(
    "host", ["localhost, evil.example", "localhost@evil.example", "evil.example#localhost", "localhost\t", "[::1",
             "127.0.0.1.evil.example", "0x7f000001", "2130706433", "localhost%00.evil", "xn--lclhost-9za"],
)  # fmt: skip
def test_a_host_that_only_looks_like_ours_is_refused(web: Web, host: str) -> None:
    answer = web.client.get("/", headers={"host": host})
    assert answer.status_code == 421 or host.strip() == "localhost"
    twice = web.client.get("/", headers=[("host", "localhost"), ("host", "evil.example")])
    assert twice.status_code == 421


def test_parameters_that_no_page_knows_make_no_other_page(own_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", 3600.0)
    monkeypatch.setattr(pages, "lab_floor", lambda *asked: (drawn.append(1), lab_floor(*asked))[1])
    bodies = {own_web.client.get(f"/?nonsense={n}&_={'x' * n}").content for n in range(1, 40)}
    assert len(bodies) == len(drawn) == 1


def test_many_who_ask_at_once_are_answered_by_one_drawing(own_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    begin = threading.Barrier(20)

    def slow(*asked: Any) -> object:
        drawn.append(1)
        time.sleep(0.1)  # as long as a page of a large lab
        return lab_floor(*asked)

    monkeypatch.setattr(pages, "lab_floor", slow)
    codes: list[int] = []

    def look() -> None:
        begin.wait()
        codes.append(own_web.client.get("/").status_code)

    threads = [threading.Thread(target=look) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 20 and len(drawn) == 1


def test_tables_of_another_revision_are_named_on_every_page(own_web: Web, caplog: pytest.LogCaptureFixture) -> None:
    own_web.alter("UPDATE alembic_version SET version_num = '9999'")
    own_web.alter("ALTER TABLE jobs RENAME TO tasks")
    for address in ("/", "/jobs", "/jobs/11", "/jobs/11/log"):
        answer = own_web.client.get(address)
        assert answer.status_code == 503 and "at revision 9999" in answer.text, address
    assert "loractl_database_up 0.0" in own_web.client.get("/metrics").text
    assert faults(caplog) == []


def test_a_database_that_is_locked_or_gone_is_said_within_seconds(
    own_web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", -1.0)
    file = tmp_path / "lab" / "lab.db"
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    answer = own_web.client.get("/jobs/11/log")
    assert answer.status_code == 503 and answer.text == "The database does not answer\n"
    assert time.monotonic() - began < 15
    holder.execute("ROLLBACK")
    holder.close()
    assert own_web.client.get("/jobs").status_code == 200
    file.write_bytes(b"no database" * 1000)
    for address in PAGES[:3]:
        assert own_web.client.get(address).status_code == 503
    assert faults(caplog) == []


def test_a_fault_of_our_own_is_one_sentence_everywhere_and_the_log_has_the_reason(
    own_web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError(f"secret {EVIL}")

    for name in ("lab_floor", "job_list", "job_dossier", "sweep_contest", "adapter_matrix"):
        monkeypatch.setattr(pages, name, broken)
    monkeypatch.setattr(JobVerbs, "log", broken)
    monkeypatch.setattr("loractl.scheduler.web.metrics.generate_latest", broken)
    for address in ("/", "/jobs", "/jobs/11", "/sweeps/1", "/adapters", *TEXTS):
        answer = own_web.client.get(address)
        assert answer.status_code == 500 and "This page could not be drawn" in answer.text, address
        assert "secret" not in answer.text and "RuntimeError" not in answer.text
    assert "secret" in caplog.text
