"""A store that holds its own clock, on each database; and a PostgreSQL of many connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from loractl.common.store.database import make_engine
from loractl.common.store.store import Store

from ...conftest import kept_engine
from ...databases import UPGRADED, database
from ..factories import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(upgraded_url: str, clock: Clock) -> Store:
    """A store on an upgraded database of each kind whose time is `clock`."""
    return Store(kept_engine(upgraded_url), clock)


@pytest.fixture
def postgres_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with database(request.getfixturevalue("postgres_server"), UPGRADED) as url:
        made = make_engine(url, connections=40)
        yield made
        made.dispose()
