"""A store that holds its own clock, on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loractl.common.store.store import Store

from ...conftest import kept_engine
from ..factories import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(upgraded_url: str, clock: Clock) -> Iterator[Store]:
    """A store on an upgraded database of each kind whose time is `clock`."""
    engine = kept_engine(upgraded_url)
    yield Store(engine, clock)
    engine.dispose()
