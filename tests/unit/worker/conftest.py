"""A lab whose time is the test's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loractl.common.store.database import make_engine

from ...held_lab import HeldLab, held_lab


@pytest.fixture
def held(upgraded_home: Path, tmp_path: Path) -> Iterator[HeldLab]:
    """Without a box yet."""
    engine = make_engine(f"sqlite:///{upgraded_home / 'loractl.db'}", connections=8)
    with held_lab(upgraded_home, tmp_path, engine) as lab:
        yield lab
    engine.dispose()
