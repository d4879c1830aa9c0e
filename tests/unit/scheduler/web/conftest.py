"""A lab that is put together once, and its page as a client sees it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from loractl.common.store.database import make_engine
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site

from .... import webs
from ...factories import NOON

PAGES = (
    "/", "/?user=wei", "/jobs", "/jobs?status=failed", "/jobs/1", "/jobs/6", "/jobs/11", "/jobs/12", "/jobs/15",
    "/jobs/17", "/jobs/18", "/sweeps", "/sweeps/1", "/adapters", "/adapters?adapter=7", "/usage",
    "/usage?by=label&days=7",
)  # fmt: skip
"""An address of each kind, and jobs in each state."""

OPEN = Access(token=None, names=frozenset({"localhost"}))


@dataclass
class Web:
    """A lab, the address of its database, and a client of its page."""

    lab: webs.SeededLab
    url: str
    client: TestClient

    def alter(self, statement: str) -> None:
        """Write into the database what no command would."""
        engine = make_engine(self.url)
        with engine.begin() as connection:
            connection.execute(text(statement))
        engine.dispose()


def serve(lab: webs.SeededLab, url: str, access: Access = OPEN) -> Web:
    store = webs.reader(url, lambda: lab.now)
    app = make_site(store, ReportShelf(store, lambda: lab.artifacts), access)
    return Web(lab=lab, url=url, client=TestClient(app, base_url="http://localhost"))


@pytest.fixture(scope="session")
def web(seeded: Path) -> Web:
    """A page that only looks: tests share it."""
    return _opened(seeded)


@pytest.fixture
def own_web(seeded: Path, tmp_path: Path) -> Iterator[Web]:
    """A lab of the test's own."""
    folder = tmp_path / "lab"
    shutil.copytree(seeded, folder)
    yield _opened(folder)


@pytest.fixture
def any_web(upgraded_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Web:
    """A lab of the test's own in a database of each kind."""
    if upgraded_url.startswith("sqlite"):
        own: Web = request.getfixturevalue("own_web")
        return own
    return serve(webs.seed(upgraded_url, tmp_path / "artifacts", NOON), upgraded_url)


def _opened(folder: Path) -> Web:
    url = f"sqlite:///{folder / 'lab.db'}"
    return serve(webs.reopen(url, folder / "artifacts", NOON), url)
