"""A lab whose time is the test's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ...conftest import kept_copy, kept_engine
from ...held_lab import HeldLab, held_lab


@pytest.fixture
def held(home: Path, sqlite_template: Path, tmp_path: Path) -> Iterator[HeldLab]:
    """Without a box yet."""
    engine = kept_engine(kept_copy(sqlite_template))
    with held_lab(home, tmp_path, engine) as lab:
        yield lab
    engine.dispose()
