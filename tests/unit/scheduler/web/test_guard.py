"""That the page only reads, for those who may, under its own name, and that nothing typed by people becomes markup."""

from __future__ import annotations

import functools
import itertools
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy.exc import DBAPIError

from loractl.common.errors import ExitCode, Forbidden, LoractlError, UsageError
from loractl.common.settings import load_settings
from loractl.common.store.columns import Prose
from loractl.common.store.database import connect_to_read, make_engine
from loractl.common.store.store import Store
from loractl.common.store.tables import Base
from loractl.scheduler.cli.main import cli
from loractl.scheduler.web.guard import COOKIE, Access, access_to, home_token

from ...factories import node_state, submission
from .conftest import PAGES, Web, serve

TOKEN = "t" * 43
LOCKED = Access(token=TOKEN, names=frozenset({"localhost", "lab.example"}))

EVIL = (
    "<img src=x onerror=alert(1)>\"'><script>alert(2)</script></title></style>\u202e\x1b[31m{{7*7}}javascript:alert(3)"
)


def test_the_database_itself_refuses_every_write(upgraded_url: str) -> None:
    store = Store(make_engine(upgraded_url))
    number = store.jobs.submit(submission())
    store.cards.see(node_state())
    reading = Store(make_engine(upgraded_url, read_only=True))
    assert reading.jobs.get(number).name == "tiny"
    for write in (
        lambda: reading.jobs.submit(submission()), lambda: reading.jobs.cancel(number, "eve"),
        lambda: reading.attempts.claim("box:0"),
        lambda: reading.cards.drain("box", "eve", "because"), lambda: reading.cards.see(node_state("evil:0")),
    ):  # fmt: skip
        with pytest.raises((DBAPIError, Forbidden), match=r"(?i)read.?only"):
            write()
    assert [job.job_id for job in store.jobs.matching()] == [number] and store.jobs.get(number).status == "queued"


def test_a_page_makes_no_database_and_upgrades_none(tmp_path: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path / "home")})
    with pytest.raises(LoractlError, match="there is no database yet"):
        connect_to_read(settings)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_no_other_method_is_answered(web: Web, method: str) -> None:
    for address in ("/", "/jobs/17", "/metrics", "/static/page.css", "/nothing"):
        answer = web.client.request(method, address)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "169.254.169.254", "", "lab.example:80", "localhost:x", "127.0.0.1:1/x"],
)
def test_a_page_under_another_name_is_refused(web: Web, host: str) -> None:
    answer = web.client.get("/", headers={"host": host})
    assert answer.status_code == 421 and "running" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8470", "127.0.0.1:8470", "[::1]:8470", "127.8.8.8"])
def test_this_machine_s_own_names_are_known(web: Web, host: str) -> None:
    assert web.client.get("/jobs", headers={"host": host}).status_code == 200


def test_without_the_token_nothing_is_shown_and_with_it_a_cookie_is_set(web: Web) -> None:
    locked = serve(web.lab, web.url, LOCKED).client
    for address in (*PAGES, "/metrics", "/jobs/11/log", "/nothing"):
        refused = locked.get(address, follow_redirects=False)
        assert refused.status_code == 401 and "triage" not in refused.text, address
    for wrong in ("", "t" * 42, TOKEN + "t", "é" * 43):
        assert locked.get("/", params={"token": wrong}, follow_redirects=False).status_code == 401
        assert locked.get("/", headers={"authorization": f"Bearer {wrong}".encode()}).status_code == 401
        locked.cookies.set(COOKIE, wrong.encode("ascii", "replace").decode())
        assert locked.get("/").status_code == 401
    locked.cookies.clear()
    first = locked.get(f"/jobs?user=wei&token={TOKEN}", follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (303, "/jobs?user=wei")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert "sql-gen-r64" in locked.get("/jobs?user=wei").text
    assert serve(web.lab, web.url, LOCKED).client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text


@pytest.mark.parametrize("host", ["127.0.0.1:80/static/x?", "localhost:1/static/", "localhost:/static/#"])
def test_a_host_with_a_path_opens_nothing_without_the_token(web: Web, host: str) -> None:
    """Starlette before 1.0.1 took the path of `request.url` from it, and styles need no token (CVE-2026-48710)."""
    answer = serve(web.lab, web.url, LOCKED).client.get("/jobs/11", headers={"host": host})
    assert answer.status_code == 421 and "triage" not in answer.text


def test_a_link_from_elsewhere_is_followed_with_the_strict_cookie(web: Web) -> None:
    """A browser keeps a strict cookie back when another site's link leads here, and on redirects that follow it."""
    locked = serve(web.lab, web.url, LOCKED).client
    elsewhere = {"sec-fetch-site": "cross-site"}
    asked = locked.get("/jobs/11?answers=broken", headers=elsewhere)
    assert asked.status_code == 200 and "triage" not in asked.text
    assert '<meta http-equiv="refresh" content="0;url=/jobs/11?answers=broken">' in asked.text
    signed = locked.get(f"/jobs/11?token={TOKEN}", headers=elsewhere, follow_redirects=False)
    assert signed.status_code == 200 and 'content="0;url=/jobs/11"' in signed.text and TOKEN not in signed.text
    evil = locked.get("http://localhost//evil.example/x?token=" + TOKEN, follow_redirects=False)
    assert evil.headers["location"].startswith("/evil"), "it leads to no other server"
    for back in ("/%5Cevil.example/", "/%09/evil.example/"):
        evil = locked.get(f"{back}?token={TOKEN}&a=%C3%A9", follow_redirects=False)
        assert evil.headers["location"] == f"{back}?a=%C3%A9"


def test_every_answer_has_the_policy(web: Web) -> None:
    for address in (*PAGES, "/metrics", "/jobs/11/log", "/nothing", "/static/refresh.js", "/static/nothing"):
        headers = web.client.get(address).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy, address
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert web.client.get("/", headers={"host": "evil"}).headers["x-frame-options"] == "DENY"


def test_no_page_has_anything_inline_or_from_elsewhere(web: Web) -> None:
    for address in PAGES:
        page = read(web.client.get(address).text)
        assert page.wrong == [], address
        assert len(page.scripts) == 1 and page.scripts[0].startswith("/static/refresh.js?v=")


HOSTILE = {
    "jobs": ("name", "user", "message", "base_model", "node"),
    "events": ("text",),
    "log_chunks": ("text",),
    "sweeps": ("name", "user"),
    "adapters": ("name", "base_model", "uri"),
    "attempts": ("node", "message", "device_name"),
    "drains": ("user", "reason"),
    "nodes": ("device_name", "fault"),
}


@pytest.mark.parametrize("table", [table for table, columns in HOSTILE.items() if columns])
def test_what_people_typed_is_shown_as_text(own_web: Web, table: str) -> None:
    for column in HOSTILE[table]:
        kind = Base.metadata.tables[table].c[column].type
        told = EVIL if isinstance(kind, Prose) else kind.harmless(EVIL)  # a line holds nothing that steers a terminal
        quoted = told.replace("'", "''").replace(":", "\\:")
        own_web.alter(f"UPDATE {table} SET \"{column}\" = '{quoted}'")
    shown = 0
    for address in (*PAGES, "/jobs/11/log"):
        answer = own_web.client.get(address)
        assert answer.status_code == 200, f"{table}: {address}"
        if not address.endswith("/log"):
            assert read(answer.text).wrong == [], f"{table}: {address}"
        assert "\u202e" not in answer.text and "\x1b" not in answer.text
        shown += "&lt;img src=x onerror" in answer.text or (address.endswith("/log") and "<img src=x" in answer.text)
    assert shown, "it is shown somewhere, as what it is"


def test_hostile_labels_settings_and_programs_are_text(own_web: Web) -> None:
    import json

    value = json.dumps({EVIL: EVIL}).replace("'", "''").replace(":", "\\:")
    own_web.alter(f"UPDATE jobs SET labels = '{value}', spec = '{value}' WHERE job_id > 6")
    data = json.dumps({EVIL: {"uri": EVIL, "sha256": EVIL}}).replace("'", "''").replace(":", "\\:")
    own_web.alter(f"UPDATE jobs SET data = '{data}' WHERE job_id > 6")
    program = json.dumps([{"pid": 1, "user": EVIL, "name": EVIL, "bytes": 9**9}]).replace("'", "''").replace(":", "\\:")
    own_web.alter(f"UPDATE nodes SET outside = '{program}'")
    for address in PAGES:
        answer = own_web.client.get(address)
        assert answer.status_code == 200 and read(answer.text).wrong == [], address


def test_hostile_parameters_are_text(web: Web) -> None:
    for key, address in itertools.product(
        ("user", "name", "status", "label", "after", "answers"), ("/jobs", "/jobs/11")
    ):
        answer = web.client.get(address, params={key: EVIL})
        assert answer.status_code in (200, 400) and read(answer.text).wrong == []
    assert web.client.get("/jobs", params={"name": "x" * 5000}).status_code == 414


def test_the_token_is_drawn_once_for_the_owner_alone(tmp_path: Path) -> None:
    first = home_token(tmp_path / "home")
    file = tmp_path / "home" / "web-token"
    assert home_token(tmp_path / "home") == first and len(first) == 43
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(LoractlError, match="others can read it"):
        home_token(tmp_path / "home")


def test_only_this_machine_s_own_address_needs_no_token(tmp_path: Path) -> None:
    assert access_to("127.0.0.1", tmp_path, (), always=False).token is None
    assert access_to("::1", tmp_path, (), always=False).token is None
    assert access_to("localhost", tmp_path, (), always=True).token
    for host in ("0.0.0.0", "192.0.2.7", "::"):
        access = access_to(host, tmp_path, ("Lab.Example",), always=False)
        assert access.token == home_token(tmp_path)
        assert access.knows(["lab.example:8470"]) and access.knows(["192.0.2.7"])
        assert not any(map(access.knows, (["evil.example"], [], ["lab.example", "lab.example"])))
    with pytest.raises(UsageError, match="is not an address"):
        access_to("lab.example", tmp_path, (), always=False)


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACTL_HOME", str(tmp_path))
    done = CliRunner().invoke(cli, ["web", "--port", "0"])
    assert isinstance(done.exception, LoractlError) and "there is no database yet" in done.exception.sentence
    wrong = CliRunner().invoke(cli, ["web", "--host", "lab.example"])
    assert isinstance(wrong.exception, UsageError) and wrong.exception.exit_code is ExitCode.USAGE


class Tags(HTMLParser):
    """Looks for what no page of ours has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script":
            self.scripts.append(given.get("src") or "inline")
        if tag in ("img", "iframe", "object", "embed", "base", "style", "template", "foreignobject", "image", "use"):
            self.wrong.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("style", "srcdoc", "formaction", "xlink:href", "ping"):
                self.wrong.append(f"{tag} {name}")
            elsewhere = re.match(r"\s*([a-z]+:|//|\\)", value or "", re.I)
            if name in ("href", "src", "action", "content") and elsewhere and not (name == "content" and tag == "meta"):
                self.wrong.append(f"{tag} {name}={value}")


@functools.cache
def read(page: str) -> Tags:
    """What is in this text: most of a lab's pages are the same whatever one table holds."""
    return Tags(page)
